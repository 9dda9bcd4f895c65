"""Format the results of `gpt2box bench`, as text, as JSON, and as a row of the GPU table in docs/cards.md."""

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
from gpt2box.system.gpu import query_nvml
from gpt2box.system.provenance import git_state
from gpt2box.utils.progress import format_bytes

if TYPE_CHECKING:
    from gpt2box.bench.timing import PlanTiming

MISSING = "–"


def build_results(
    config: Config,
    plan: RunPlan,
    target: TargetDevice,
    measured_ways: list[tuple[PlanTiming, BenchRecord, float]],
    failed_ways: list[PlanTiming],
    other: dict[str, Any],
) -> dict[str, Any]:
    """Return the results for --json: bytes, seconds, tokens per second.

    `measured_ways` has the fastest first; `other` holds the figures of loader, evaluation and checkpoint.
    """
    results: dict[str, Any] = {
        "name": config.name,
        "card": target.bench_name or target.name,
        "free_bytes": target.free_bytes,
        "versions": program_versions(),
        "when": time.strftime("%Y-%m-%d"),
        "shape": asdict(plan.shape),
        "parameters": plan.shape.parameters,
        "dtype": plan.derived.dtype,
        "tokens_per_step": plan.config.tokens_per_step,
        "ways": [way_row(way, record, tokens_per_sec) for way, record, tokens_per_sec in measured_ways]
        + [way_row(way, None, None) for way in failed_ways],
    }
    if not measured_ways:
        return results
    way, record, tokens_per_sec = measured_ways[0]
    results["way"] = way_row(way, record, tokens_per_sec)
    step_s = record.step_s(way.execution.grad_accum_steps)
    save_every_s = plan.derived.save_interval * step_s
    if plan.config.save_minutes:
        save_every_s = min(save_every_s, plan.config.save_minutes * 60)
    results["measured"] = {
        "step_s": step_s,
        "micro_step_s": step_s / way.execution.grad_accum_steps,
        "tokens_per_sec": tokens_per_sec,
        "mfu": plan.mfu(tokens_per_sec),
        "memory_bytes": record.peak_bytes or other.get("memory_bytes"),
        "loader_s": other.get("loader_s"),
        "evaluation_s": other.get("evaluation_s"),
        "evaluation_windows": other.get("evaluation_windows"),
        "evaluation_share": time_share(other.get("evaluation_s"), plan.config.eval_interval * step_s),
        "checkpoint_s": other.get("checkpoint_s"),
        "checkpoint_durable_s": other.get("checkpoint_durable_s"),
        "checkpoint_bytes": other.get("checkpoint_bytes"),
        "checkpoint_share": time_share(other.get("checkpoint_s"), save_every_s),
        "checkpoint_fault": other.get("checkpoint_fault"),
    }
    results["estimated"] = {
        "tokens_per_sec": way.execution.tokens_per_sec or None,
        "memory_bytes": way.execution.memory.total,
        "checkpoint_bytes": plan.derived.checkpoint_bytes,
    }
    return results


def way_row(way: PlanTiming, record: BenchRecord | None, tokens_per_sec: float | None) -> dict[str, Any]:
    """Return one entry of "ways": an execution plan with its measured and estimated speed and memory."""
    return {
        "micro_batch_size": way.execution.micro_batch_size,
        "grad_accum_steps": way.execution.grad_accum_steps,
        "activation_checkpointing": way.execution.activation_checkpointing,
        "compiled": way.execution.compile,
        "tokens_per_sec": tokens_per_sec,
        "tokens_per_sec_estimated": way.execution.tokens_per_sec or None,
        "memory_bytes": (record.peak_bytes if record else 0) or None,
        "memory_bytes_estimated": way.execution.memory.total,
        "fault": way.fault or None,
    }


def time_share(seconds: float | None, interval_s: float) -> float | None:
    """Return the share of total time of a task that takes `seconds` after every `interval_s` of training."""
    return None if seconds is None else seconds / (seconds + interval_s)


def program_versions() -> dict[str, str]:
    """Return the versions of the software that the measurements depend on."""
    return {
        "gpt2box": f"{__version__} {git_state()[:8]}".strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "driver": query_nvml().driver,
    }


def format_rate(tokens_per_sec: float | None) -> str:
    """Format a speed in tokens per second."""
    return f"{tokens_per_sec:,.0f} tokens/s" if tokens_per_sec else MISSING


def format_seconds(seconds: float | None) -> str:
    """Format a duration in ms or s."""
    if seconds is None:
        return MISSING
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:,.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def describe_way(way: dict[str, Any]) -> str:
    """Describe an execution plan: micro-batch size, activation checkpointing, compilation."""
    compiled = "compiled" if way["compiled"] else "not compiled"
    return f"micro_batch_size {way['micro_batch_size']}, checkpointing {way['activation_checkpointing']}, {compiled}"


def format_lines(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the report, with measured and estimated figures side by side."""
    if len(results["ways"]) > 1:
        yield f"{'execution plans, fastest first':62} {'measured':>16} {'estimated':>16}"
        for way in results["ways"]:
            outcome = way["fault"] or format_rate(way["tokens_per_sec"])
            yield f"  {describe_way(way):60} {outcome:>16} {format_rate(way['tokens_per_sec_estimated']):>16}"
    way, measured, estimated = results["way"], results["measured"], results["estimated"]
    block_size = results["shape"]["block_size"]
    yield f"{results['card']}: {results['parameters']:,} parameters, {results['dtype']}, {describe_way(way)}"
    yield f"  {'':12} {'measured':>16} {'estimated':>16}"
    tokens = (
        f"{results['tokens_per_step']:,} = {way['micro_batch_size']} × {block_size} × {way['grad_accum_steps']} tokens"
    )
    yield format_entry("step", format_seconds(measured["step_s"]), MISSING, tokens)
    yield format_entry("speed", format_rate(measured["tokens_per_sec"]), format_rate(estimated["tokens_per_sec"]))
    mfu = measured["mfu"]
    yield format_entry(
        "MFU", MISSING if mfu is None else f"{mfu:.0%}", note="" if mfu else "the peak of this device is unknown"
    )
    memory = measured["memory_bytes"]
    scope = "with an estimate for CUDA itself" if way["memory_bytes"] else "without Python and PyTorch themselves"
    yield format_entry(
        "memory",
        format_bytes(memory) if memory else MISSING,
        format_bytes(estimated["memory_bytes"]),
        scope if memory else "",
    )
    if (loader := measured["loader_s"]) is not None:
        note = f"per micro-batch, read while the previous one is computed ({format_seconds(measured['micro_step_s'])})"
        yield format_entry("data", format_seconds(loader), note=note)
    if measured["evaluation_s"] is not None:
        note = f"{measured['evaluation_windows']:,} windows; {measured['evaluation_share']:.1%} of total time"
        yield format_entry("evaluation", format_seconds(measured["evaluation_s"]), note=note)
    if measured["checkpoint_fault"]:
        yield format_entry("checkpoint", MISSING, note=f"not tried: {measured['checkpoint_fault']}")
    elif measured["checkpoint_s"] is not None:
        sizes = f"{format_bytes(measured['checkpoint_bytes'])}, estimated {format_bytes(estimated['checkpoint_bytes'])}"
        saved = f"{sizes}; durable after {format_seconds(measured['checkpoint_durable_s'])}"
        note = f"{saved}; training waits for {measured['checkpoint_share']:.1%} of total time"
        yield format_entry("checkpoint", format_seconds(measured["checkpoint_s"]), note=note)
    yield f"  {', '.join(f'{name} {version}' for name, version in results['versions'].items() if version)}"


def format_entry(name: str, measured: str, estimated: str = MISSING, note: str = "") -> str:
    """Format one line: name, measured, estimated, note."""
    return f"  {name:12} {measured:>16} {estimated:>16}   {note}".rstrip()


def format_share_row(results: dict[str, Any]) -> str:
    """Return one row of the table in docs/cards.md."""
    way, measured, estimated, shape = results["way"], results["measured"], results["estimated"], results["shape"]
    mfu = measured["mfu"]
    cells = [
        results["card"],
        f"{results['parameters'] / 1e6:,.0f}M"
        if results["parameters"] >= 1e6
        else f"{results['parameters'] / 1e3:,.0f}k",
        f"{way['micro_batch_size']} × {shape['block_size']} × {way['grad_accum_steps']}",
        f"{results['dtype']}, {'compiled' if way['compiled'] else 'not compiled'}, {way['activation_checkpointing']}",
        f"{measured['tokens_per_sec']:,.0f}",
        f"{estimated['tokens_per_sec']:,.0f}" if estimated["tokens_per_sec"] else MISSING,
        MISSING if mfu is None else f"{mfu:.0%}",
        format_bytes(measured["memory_bytes"]) if measured["memory_bytes"] else MISSING,
        format_bytes(estimated["memory_bytes"]),
        format_seconds(measured["loader_s"]),
        format_seconds(measured["evaluation_s"]),
        format_seconds(measured["checkpoint_s"]),
        ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version),
        results["when"],
    ]
    return f"| {' | '.join(cells)} |"
