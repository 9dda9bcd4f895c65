"""`gpt2box monitor`: the card and the run, beside the training, in another terminal or container. It only reads."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2box.errors import BadInput
from gpt2box.runs.metrics import parse_rows
from gpt2box.runs.plan_file import read_plan
from gpt2box.runs.tail import find_newest_run, read_tail
from gpt2box.system.gpu import Card, ask_driver
from gpt2box.utils.files import whole
from gpt2box.utils.paths import run_dir, run_folders, runs_dir
from gpt2box.utils.progress import LINE_SECONDS, duration, size

REFRESH_SECONDS = 2.0


def monitor(name: str | None, once: bool) -> None:
    """Show until interrupted; on a terminal in place, else a block of lines now and then.

    Raises:
        BadInput: no such run.
    """
    if name is not None and not run_dir(name).is_dir():
        there = ", ".join(sorted(path.name for path in run_folders() if (path / "config.yaml").exists())) or "none yet"
        raise BadInput(f"no run {name}", f"one of: {there}")
    if once:
        print("\n".join(status_lines(name)))
    elif sys.stdout.isatty():
        from rich.live import Live
        from rich.text import Text

        with Live(refresh_per_second=4) as live:
            while True:
                live.update(Text("\n".join(status_lines(name))))
                time.sleep(REFRESH_SECONDS)
    else:
        while True:
            print("\n".join(status_lines(name)), flush=True)
            time.sleep(LINE_SECONDS)


def status_lines(name: str | None) -> Iterator[str]:
    """The cards, then the run."""
    nvml = ask_driver()
    if nvml.fault:
        yield f"no card: {nvml.fault}"
    yield from (format_gpu(card) for card in nvml.cards)
    folder = run_dir(name) if name else find_newest_run()
    yield format_run(folder) if folder else f"no run in {runs_dir()} yet"


def format_gpu(card: Card) -> str:
    """A card's figures, as far as the driver tells them."""
    parts = [card.name]
    if card.busy_percent is not None:
        parts.append(f"{card.busy_percent}% busy")
    if card.total_bytes is not None and card.free_bytes is not None:
        parts.append(f"{size(card.total_bytes - card.free_bytes)} of {size(card.total_bytes)}")
    if card.temperature_c is not None:
        parts.append(f"{card.temperature_c} °C")
    if card.power_w is not None:
        parts.append(f"{card.power_w:.0f} W" + (f" of {card.power_limit_w:.0f} W" if card.power_limit_w else ""))
    return "  ".join(parts)


def format_run(folder: Path) -> str:
    """Where a run is: the last line of each kind in its metrics.jsonl."""
    last: dict[str, dict[str, Any]] = {}
    for row in parse_rows(read_tail(folder / "metrics.jsonl").splitlines()):
        last[row["kind"]] = row
    if not last:
        return f"{folder.name}  not one step yet"
    plan = read_plan(folder)
    steps = whole(plan.get("max_steps"))
    step = max(row["step"] for row in last.values())
    parts = [folder.name, f"step {step:,}" + (f"/{steps:,}" if steps else "")]
    train, evaluated = last.get("train", {}), last.get("eval", {})
    if train.get("loss") is not None:
        parts.append(f"loss {train['loss']:.4f}")
    if evaluated.get("val_loss") is not None:
        parts.append(f"val_loss {evaluated['val_loss']:.4f} at step {evaluated['step']:,}")
    if rate := train.get("tokens_per_sec"):
        parts.append(f"{rate:,.0f} tokens/s")
        if steps and step < steps:
            parts.append(f"{duration((steps - step) * whole(plan.get('tokens_per_step')) / rate)} left")
    age = time.time() - max(row.get("time") or 0 for row in last.values())
    if age > 120 and step < (steps or step):
        parts.append(f"(last heard of {duration(age)} ago)")
    return "  ".join(parts)
