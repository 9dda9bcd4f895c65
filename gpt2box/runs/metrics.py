"""What a run writes down while it goes: metrics.jsonl, the same for TensorBoard, and for programs that look on.

metrics.jsonl, one object a line. Every line has `step`, `kind` and `time` (Unix seconds).
    train   loss (mean since the last line), learning_rate, grad_norm (of the last step), tokens_per_sec,
            peak_memory_bytes, skipped_steps (left out so far in this session), loss_spikes (those of them whose loss
            was finite and far above the steps before), mfu (of the card, or null),
            digest (16 hex digits: a sum over the bits of weights and averages at that step, training/digest.py)
    eval    val_loss, val_set (its name: runs compare where it is equal), best
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard.writer import SummaryWriter

from gpt2box.errors import why
from gpt2box.runs.wandb import WandbRun
from gpt2box.utils.files import parse_json, regular, write_atomically
from gpt2box.utils.paths import make_writable
from gpt2box.utils.progress import say

TEXT_FIELDS = ("kind", "digest", "val_set")  # all else that a line holds is a number or nothing


class MetricsWriter:
    """Appends to metrics.jsonl; begins by dropping lines from steps that will be done again, and a torn last line.

    Every number goes to TensorBoard's events beside it, too, under the same name. With `echo` each line is also
    written to standard output; with `wandb` other than "off" the numbers go to Weights & Biases, as well. A run does
    not end for the events: where they cannot be written it is said, by `line`, and there are no more of them.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        evaluated_step: int,
        echo: bool = False,
        wandb: str = "off",
        line: Callable[[str], None] = say,
    ) -> None:
        self._echo, self._line = echo, line
        drop_rows_after(path, step, evaluated_step)
        self._file = open(path, "a", encoding="utf-8", opener=regular)  # noqa: SIM115, closed with the run
        from torch.utils.tensorboard.writer import SummaryWriter  # a second to import

        events = make_writable(path.parent / "tensorboard")  # else a thread of its own would say so
        threading.excepthook = ignore_tensorboard_thread_errors
        self._events: SummaryWriter | None = SummaryWriter(str(events), purge_step=step + 1)
        self._tracker = None if wandb == "off" else WandbRun(path.parent, wandb)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Append a line and hand it to the system at once."""
        line = json.dumps({"step": step, "kind": kind, **values, "time": round(time.time(), 3)})
        self._file.write(line + "\n")
        self._file.flush()
        if self._echo:
            try:
                print(line, flush=True)
            except OSError as error:  # its reader has gone; the file has all of it
                self._echo = False
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python holds of it goes there
                self._line(f"no more figures on standard output: {why(error)}")
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

        def add(events: SummaryWriter) -> None:
            for name, value in numbers.items():
                events.add_scalar(name, value, step)

        self._have_events(add)
        if self._tracker is not None:
            self._tracker.log(step, numbers)

    def close(self) -> None:
        self._file.close()
        self._have_events(lambda events: events.close())
        if self._tracker is not None:
            self._tracker.close()

    def _have_events(self, do: Callable[[SummaryWriter], object]) -> None:
        if self._events is None:
            return
        try:
            do(self._events)
        except Exception as error:  # what its thread met: a full disk, a folder that is gone
            self._events = None
            self._line(f"no more events for TensorBoard: {why(error)}")


def ignore_tensorboard_thread_errors(arguments: threading.ExceptHookArgs) -> None:
    """For threading.excepthook: what TensorBoard's thread meets its caller raises; it need not print it as well."""
    if not type(arguments.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(arguments)


def drop_rows_after(path: Path, step: int, evaluated_step: int) -> None:
    """Leave out what is not of the steps so far, and what is no whole line; line by line, as there may be many."""

    def kept(lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            if any(row["step"] <= (step if row["kind"] == "train" else evaluated_step) for row in parse_rows([line])):
                yield line.rstrip("\n") + "\n"

    if path.exists():
        with open(path, encoding="utf-8", errors="replace", opener=regular) as file:
            write_atomically(path, kept(file))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a torn one."""
    return list(iter_rows(path))


def iter_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The same, one after the other: a long run has a million. Nothing where there is no such file."""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace", opener=regular) as file:
            yield from parse_rows(file)


def parse_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The whole lines among those of a piece of a metrics.jsonl."""
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and is_valid_row(row):
            yield row


def is_valid_row(row: dict[str, Any]) -> bool:
    """Whether a line says what `Metrics.write` does: a step, a kind, numbers, and words that can be printed."""
    step, kind = row.get("step"), row.get("kind")
    if type(step) is not int or not 0 <= step < 2**53 or not isinstance(kind, str):
        return False
    return all(
        value is None or isinstance(value, float | int) or is_valid_text(name, value) for name, value in row.items()
    )


def is_valid_text(name: str, value: object) -> bool:
    """Whether it may stand there, and be printed."""
    return name in TEXT_FIELDS and isinstance(value, str) and value.isascii() and value.isprintable()


class LogInterval:
    """Steps, loss and time since the last log line, with evaluation and saving left out of the time."""

    def __init__(self) -> None:
        self._loss: Tensor | float = 0.0
        self._steps = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)  # intervals
        self._begun = time.monotonic()

    def add(self, loss: Tensor) -> None:
        self._loss = self._loss + loss
        self._steps += 1

    def leave_out(self, seconds: float) -> None:
        self._begun += seconds

    def take(self) -> tuple[float, int, float]:
        """Mean loss, steps and seconds; begins anew. Waits for the device."""
        steps = self._steps
        loss = float(self._loss) / max(steps, 1)
        seconds = time.monotonic() - self._begun
        self._loss, self._steps, self._begun = 0.0, 0, time.monotonic()
        self._recent.append((steps, seconds))
        return loss, steps, seconds

    def step_seconds(self) -> float:
        """Of a step, over the last intervals: what other programs do to one of them does not move the time left."""
        return sum(seconds for _, seconds in self._recent) / max(sum(steps for steps, _ in self._recent), 1)


def finite_or_none(value: float) -> float | None:
    """NaN and infinity are not JSON."""
    return value if math.isfinite(value) else None


def skip_reason(skipped: int, spikes: int) -> str:
    """Why steps were left out, so many of them for a loss that was finite."""
    if not spikes:
        return "loss or gradient not finite"
    return f"loss {'not finite or ' if spikes < skipped else ''}far above the steps before"


def format_skipped_steps(row: dict[str, Any]) -> str:
    """A train line's steps that were left out, in words."""
    skipped = int(row["skipped_steps"])
    return f"{skipped:,} step{'s' * (skipped > 1)} left out: {skip_reason(skipped, int(row.get('loss_spikes', 0)))}"
