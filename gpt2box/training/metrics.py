"""What a run writes down while it goes: metrics.jsonl, and a bar or lines for the user.

metrics.jsonl, one object a line. Every line has `step`, `kind` and `time` (Unix seconds).
    train   loss (mean since the last line), learning_rate, grad_norm (of the last step), tokens_per_sec,
            peak_memory_bytes, skipped_steps (non-finite, so far in this session)
    eval    val_loss, val_set (its name: runs compare where it is equal), best
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from gpt2box.paths import write_atomically
from gpt2box.progress import LINE_SECONDS, duration, say, size


class Metrics:
    """Appends to metrics.jsonl; begins by dropping lines from steps that will be done again, and a torn last line."""

    def __init__(self, path: Path, step: int, evaluated_step: int) -> None:
        kept = [row for row in read(path) if row["step"] <= (step if row["kind"] == "train" else evaluated_step)]
        if path.exists():
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed with the run

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Append a line and hand it to the system at once."""
        self._file.write(json.dumps({"step": step, "kind": kind, **values, "time": round(time.time(), 3)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a torn one."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                rows.append({**row, "step": int(row["step"]), "kind": str(row["kind"])})
            except (ValueError, KeyError, TypeError):
                continue
    return rows


class Display:
    """A bar on a terminal, a line at most every few seconds in a log."""

    def __init__(self, step: int, max_steps: int) -> None:
        self._max_steps = max_steps
        self._bar: Any = None
        self._printed = 0.0
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("step {task.completed:,}/{task.total:,}"),
                BarColumn(None),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True, expand=True)
            self._task = self._bar.add_task("", total=max_steps, completed=step, text="")
            self._bar.start()

    def train(self, step: int, loss: float, tokens_per_sec: float, seconds_left: float, memory_bytes: int) -> None:
        """Show a step's figures."""
        text = f"loss {loss:.4f}  {tokens_per_sec:,.0f} tokens/s  {size(memory_bytes)}  {duration(seconds_left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif time.monotonic() - self._printed >= LINE_SECONDS or step == self._max_steps:
            self._printed = time.monotonic()
            say(f"step {step:,}/{self._max_steps:,}  {text}")

    def line(self, text: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
