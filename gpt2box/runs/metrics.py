"""Write and read metrics.jsonl, a run's log of numbers, and copy it to TensorBoard, standard output and W&B.

Each line is a JSON object, a row, with `step`, `kind` and `time` (Unix seconds), and by kind:
    train   loss (mean since the last row), learning_rate, grad_norm (of the last step), tokens_per_sec,
            peak_memory_bytes, skipped_steps (so far in this session), loss_spikes (skipped steps whose loss was
            finite and far above the steps before), mfu (of the GPU, or null),
            digest (16 hex digits: a sum over the bits of weights and optimizer state, checkpoint/fingerprint.py)
    eval    val_loss, val_set (name of the validation windows: val_loss compares only if equal), best
"""

from __future__ import annotations

import json
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

from gpt2box.errors import describe_error
from gpt2box.runs.wandb import WandbRun
from gpt2box.utils.files import open_regular, parse_json, write_atomically
from gpt2box.utils.paths import ensure_writable
from gpt2box.utils.progress import log_line

TEXT_FIELDS = ("kind", "digest", "val_set")  # all other fields are numbers or null
TAIL_BYTES = 1 << 20  # of metrics.jsonl: enough for the newest row of each kind


class MetricsWriter:
    """Appends rows to metrics.jsonl. First drops the rows of steps that will be repeated, and a torn last line.

    Numbers also go to TensorBoard; with `echo`, rows go to standard output; with `wandb` other than "off", numbers go
    to Weights & Biases. A failure to write TensorBoard events does not end the run: `log` reports it, once.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        evaluated_step: int,
        echo: bool = False,
        wandb: str = "off",
        log: Callable[[str], None] = log_line,
    ) -> None:
        self._echo, self._log = echo, log
        drop_rows_after(path, step, evaluated_step)
        self._file = open(path, "a", encoding="utf-8", opener=open_regular)  # noqa: SIM115, closed by close()
        from torch.utils.tensorboard.writer import SummaryWriter  # takes a second to import

        events = ensure_writable(path.parent / "tensorboard")  # else the writer's thread would report it
        threading.excepthook = ignore_tensorboard_thread_errors
        self._events: SummaryWriter | None = SummaryWriter(str(events), purge_step=step + 1)
        self._wandb = None if wandb == "off" else WandbRun(path.parent, wandb)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Append a row and flush it."""
        line = json.dumps({"step": step, "kind": kind, **values, "time": round(time.time(), 3)})
        self._file.write(line + "\n")
        self._file.flush()
        if self._echo:
            try:
                print(line, flush=True)
            except OSError as error:  # the reader has closed the pipe; metrics.jsonl is complete
                self._echo = False
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python has buffered
                self._log(f"no more metrics on standard output: {describe_error(error)}")
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

        def add_scalars(events: SummaryWriter) -> None:
            for name, value in numbers.items():
                events.add_scalar(name, value, step)

        self._with_events(add_scalars)
        if self._wandb is not None:
            self._wandb.log(step, numbers)

    def close(self) -> None:
        self._file.close()
        self._with_events(lambda events: events.close())
        if self._wandb is not None:
            self._wandb.close()

    def _with_events(self, action: Callable[[SummaryWriter], object]) -> None:
        if self._events is None:
            return
        try:
            action(self._events)
        except Exception as error:  # raised in the writer's thread: disk full, folder gone
            self._events = None
            self._log(f"no more events for TensorBoard: {describe_error(error)}")


def ignore_tensorboard_thread_errors(arguments: threading.ExceptHookArgs) -> None:
    """Handle threading.excepthook: do not print what TensorBoard's thread raises, since its caller raises it again."""
    if not type(arguments.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(arguments)


def drop_rows_after(path: Path, step: int, evaluated_step: int) -> None:
    """Rewrite metrics.jsonl without rows after `step` (eval rows: `evaluated_step`) and invalid lines."""

    def rows_to_keep(lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            if any(row["step"] <= (step if row["kind"] == "train" else evaluated_step) for row in parse_rows([line])):
                yield line.rstrip("\n") + "\n"

    if path.exists():
        with open(path, encoding="utf-8", errors="replace", opener=open_regular) as file:
            write_atomically(path, rows_to_keep(file))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the valid rows of a metrics.jsonl."""
    return list(iter_rows(path))


def iter_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the valid rows of a metrics.jsonl, a million in a long run. A missing file has none."""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace", opener=open_regular) as file:
            yield from parse_rows(file)


def parse_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Parse lines of a metrics.jsonl, skipping invalid ones."""
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and is_valid_row(row):
            yield row


def is_valid_row(row: dict[str, Any]) -> bool:
    """Return True if a row has a step, a kind, numbers and printable text, as `MetricsWriter.write` writes them."""
    step, kind = row.get("step"), row.get("kind")
    if type(step) is not int or not 0 <= step < 2**53 or not isinstance(kind, str):
        return False
    return all(
        value is None or isinstance(value, float | int) or is_valid_text(name, value) for name, value in row.items()
    )


def is_valid_text(name: str, value: object) -> bool:
    """Return True if the field may hold text, and the text is safe to print."""
    return name in TEXT_FIELDS and isinstance(value, str) and value.isascii() and value.isprintable()


def to_number(value: object) -> float | None:
    """Return a finite number of a file as a float; None for anything else, and for numbers of 1e300 and more."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None


def read_tail(path: Path, max_bytes: int = TAIL_BYTES) -> str:
    """Read the last complete lines of a file; empty if it is missing."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            start = max(os.fstat(file.fileno()).st_size - max_bytes, 0)
            file.seek(start)
            content = file.read().decode("utf-8", errors="replace")
    except (FileNotFoundError, IsADirectoryError):
        return ""
    return content.partition("\n")[2] if start else content


class LogInterval:
    """Accumulates loss, steps and time since the last row. Evaluation and saving do not count as time."""

    def __init__(self) -> None:
        self._loss: Tensor | float = 0.0
        self._steps = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)  # steps and seconds of the last intervals
        self._started_at = time.monotonic()

    def add_step(self, loss: Tensor) -> None:
        """Count a step, without waiting for the device."""
        self._loss = self._loss + loss
        self._steps += 1

    def exclude_seconds(self, seconds: float) -> None:
        """Do not count time that was spent on something else."""
        self._started_at += seconds

    def finish(self) -> tuple[float, int, float]:
        """Return mean loss, steps and seconds, and start the next interval. Waits for the device."""
        steps = self._steps
        loss = float(self._loss) / max(steps, 1)
        seconds = time.monotonic() - self._started_at
        self._loss, self._steps, self._started_at = 0.0, 0, time.monotonic()
        self._recent.append((steps, seconds))
        return loss, steps, seconds

    def mean_step_seconds(self) -> float:
        """Return the time of a step over the last 20 intervals, so that a short disturbance does not move the ETA."""
        return sum(seconds for _, seconds in self._recent) / max(sum(steps for steps, _ in self._recent), 1)
