"""What `gpt2box bench` found, in words, for programs, and as a row of the table of cards (docs/cards.md)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from gpt2box import __version__
from gpt2box.config.schema import Config
from gpt2box.planner.bench_records import BenchRecord
from gpt2box.planner.run_plan import RunPlan
from gpt2box.planner.target_device import TargetDevice
from gpt2box.system.gpu import ask_driver
from gpt2box.system.provenance import git_state
from gpt2box.utils.progress import size

if TYPE_CHECKING:
    from gpt2box.bench.timing import Way

NOTHING = "–"


def figures(
    config: Config,
    plan: RunPlan,
    place: TargetDevice,
    done: list[tuple[Way, BenchRecord, float]],
    faulty: list[Way],
    beside: dict[str, Any],
) -> dict[str, Any]:
    """For programs: bytes, seconds, tokens a second; `done` has the fastest way first."""
    found: dict[str, Any] = {
        "name": config.name,
        "card": place.bench_name or place.name,
        "free_bytes": place.free_bytes,
        "versions": versions(),
        "when": time.strftime("%Y-%m-%d"),
        "shape": asdict(plan.shape),
        "parameters": plan.parameters,
        "dtype": plan.dtype,
        "tokens_per_step": plan.tokens_per_step,
        "ways": [way_row(way, record, pace) for way, record, pace in done]
        + [way_row(way, None, None) for way in faulty],
    }
    if not done:
        return found
    way, record, pace = done[0]
    found["way"] = way_row(way, record, pace)
    step_s = record.step_s(way.option.grad_accum_steps)
    save_every_s = plan.save_interval * step_s
    if plan.save_minutes:
        save_every_s = min(save_every_s, plan.save_minutes * 60)
    found["measured"] = {
        "step_s": step_s,
        "micro_step_s": step_s / way.option.grad_accum_steps,
        "tokens_per_sec": pace,
        "mfu": plan.mfu(pace),
        "memory_bytes": record.peak_bytes or beside.get("memory_bytes"),
        "loader_s": beside.get("loader_s"),
        "evaluation_s": beside.get("evaluation_s"),
        "evaluation_windows": beside.get("evaluation_windows"),
        "evaluation_share": share(beside.get("evaluation_s"), plan.eval_interval * step_s),
        "checkpoint_s": beside.get("checkpoint_s"),
        "checkpoint_durable_s": beside.get("checkpoint_durable_s"),
        "checkpoint_bytes": beside.get("checkpoint_bytes"),
        "checkpoint_share": share(beside.get("checkpoint_s"), save_every_s),
        "checkpoint_fault": beside.get("checkpoint_fault"),
    }
    found["estimated"] = {
        "tokens_per_sec": way.option.tokens_per_sec or None,
        "memory_bytes": way.option.memory.total,
        "checkpoint_bytes": plan.checkpoint_bytes,
    }
    return found


def way_row(way: Way, record: BenchRecord | None, pace: float | None) -> dict[str, Any]:
    """A way to do the steps."""
    return {
        "micro_batch_size": way.option.micro_batch_size,
        "grad_accum_steps": way.option.grad_accum_steps,
        "activation_checkpointing": way.option.activation_checkpointing,
        "compiled": way.compiled,
        "tokens_per_sec": pace,
        "tokens_per_sec_estimated": way.option.tokens_per_sec or None,
        "memory_bytes": (record.peak_bytes if record else 0) or None,
        "memory_bytes_estimated": way.option.memory.total,
        "fault": way.fault or None,
    }


def share(seconds: float | None, between: float) -> float | None:
    """Of all time, of what takes so long after every so many seconds of training."""
    return None if seconds is None else seconds / (seconds + between)


def versions() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "gpt2box": f"{__version__} {git_state()[:8]}".strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "driver": ask_driver().driver,
    }


def rate(pace: float | None) -> str:
    """Tokens a second in words."""
    return f"{pace:,.0f} tokens/s" if pace else NOTHING


def span(seconds: float | None) -> str:
    """Seconds in a unit of fitting size."""
    if seconds is None:
        return NOTHING
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:,.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def way_words(way: dict[str, Any]) -> str:
    """Micro-batch, recompute, compiled."""
    compiled = "compiled" if way["compiled"] else "not compiled"
    return f"micro_batch_size {way['micro_batch_size']}, recompute {way['activation_checkpointing']}, {compiled}"


def lines(found: dict[str, Any]) -> Iterator[str]:
    """For people: measured beside estimated."""
    if len(found["ways"]) > 1:
        yield f"{'ways, fastest first':58} {'measured':>16} {'estimated':>16}"
        for way in found["ways"]:
            pace = way["fault"] or rate(way["tokens_per_sec"])
            yield f"  {way_words(way):56} {pace:>16} {rate(way['tokens_per_sec_estimated']):>16}"
    way, measured, estimated = found["way"], found["measured"], found["estimated"]
    block_size = found["shape"]["block_size"]
    yield f"{found['card']}: {found['parameters']:,} parameters, {found['dtype']}, {way_words(way)}"
    yield f"  {'':12} {'measured':>16} {'estimated':>16}"
    tokens = (
        f"{found['tokens_per_step']:,} = {way['micro_batch_size']} × {block_size} × {way['grad_accum_steps']} tokens"
    )
    yield entry("step", span(measured["step_s"]), NOTHING, tokens)
    yield entry("speed", rate(measured["tokens_per_sec"]), rate(estimated["tokens_per_sec"]))
    mfu = measured["mfu"]
    yield entry("MFU", NOTHING if mfu is None else f"{mfu:.0%}", note="" if mfu else "no peak is known of this device")
    memory = measured["memory_bytes"]
    of = "with CUDA's own, which is estimated" if way["memory_bytes"] else "without Python and PyTorch themselves"
    yield entry("memory", size(memory) if memory else NOTHING, size(estimated["memory_bytes"]), of if memory else "")
    if (loader := measured["loader_s"]) is not None:
        hidden = f"a micro-batch, read while another is worked on ({span(measured['micro_step_s'])})"
        yield entry("data", span(loader), note=hidden)
    if measured["evaluation_s"] is not None:
        every = f"{measured['evaluation_windows']:,} windows; {measured['evaluation_share']:.1%} of all time"
        yield entry("evaluation", span(measured["evaluation_s"]), note=every)
    if measured["checkpoint_fault"]:
        yield entry("checkpoint", NOTHING, note=f"not tried: {measured['checkpoint_fault']}")
    elif measured["checkpoint_s"] is not None:
        bytes_of_it = f"{size(measured['checkpoint_bytes'])}, estimated {size(estimated['checkpoint_bytes'])}"
        whole = f"{bytes_of_it}; whole after {span(measured['checkpoint_durable_s'])}"
        waits = f"{whole}; training waits for {measured['checkpoint_share']:.1%} of all time"
        yield entry("checkpoint", span(measured["checkpoint_s"]), note=waits)
    yield f"  {', '.join(f'{name} {version}' for name, version in found['versions'].items() if version)}"


def entry(name: str, measured: str, estimated: str = NOTHING, note: str = "") -> str:
    """A line of the table."""
    return f"  {name:12} {measured:>16} {estimated:>16}   {note}".rstrip()


def row(found: dict[str, Any]) -> str:
    """One row of docs/cards.md."""
    way, measured, estimated, shape = found["way"], found["measured"], found["estimated"], found["shape"]
    mfu = measured["mfu"]
    cells = [
        found["card"],
        f"{found['parameters'] / 1e6:,.0f}M" if found["parameters"] >= 1e6 else f"{found['parameters'] / 1e3:,.0f}k",
        f"{way['micro_batch_size']} × {shape['block_size']} × {way['grad_accum_steps']}",
        f"{found['dtype']}, {'compiled' if way['compiled'] else 'not compiled'}, {way['activation_checkpointing']}",
        f"{measured['tokens_per_sec']:,.0f}",
        f"{estimated['tokens_per_sec']:,.0f}" if estimated["tokens_per_sec"] else NOTHING,
        NOTHING if mfu is None else f"{mfu:.0%}",
        size(measured["memory_bytes"]) if measured["memory_bytes"] else NOTHING,
        size(estimated["memory_bytes"]),
        span(measured["loader_s"]),
        span(measured["evaluation_s"]),
        span(measured["checkpoint_s"]),
        ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version),
        found["when"],
    ]
    return f"| {' | '.join(cells)} |"
