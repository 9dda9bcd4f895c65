"""Read a run's folder: the one view that `gpt2box runs`, the report, the dashboard and the monitor share.

Reading never writes, copes with missing and damaged files, and may happen while the run is trained.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpt2box.config.loader import read_yaml
from gpt2box.errors import BadInput
from gpt2box.runs.formatting import format_count, format_figures, format_log_line, format_loss, format_step
from gpt2box.runs.manifest import read_plan
from gpt2box.runs.metrics import parse_rows, read_tail, to_number
from gpt2box.utils.files import count_or_zero, is_locked, read_json_object
from gpt2box.utils.paths import display_path, list_checkpoints, run_dir
from gpt2box.utils.progress import format_duration

if TYPE_CHECKING:
    from gpt2box.runs.history import History

State = Literal["training", "stopped", "finished", "damaged"]
MAX_SILENCE_S = 120  # without a new row, after which a run in training is reported as silent


@dataclass(frozen=True)
class RunSummary:
    """A run at a glance. Unknown values are None or 0."""

    name: str
    state: State
    fault: str  # of a damaged run
    stopped_early: bool  # finished because val_loss no longer improved
    step: int  # in training: the newest row's; otherwise the newest checkpoint's, from which the run would resume
    max_steps: int
    best_val_loss: float | None
    best_step: int | None
    tokens: int  # seen up to `step`, with repetition
    seconds: int  # of training, up to `step`
    size_bytes: int  # on disk
    changed: float  # Unix seconds of the newest row

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for `gpt2box runs --json`."""
        return {**asdict(self), "folder": display_path(run_dir(self.name))}

    @property
    def state_label(self) -> str:
        """Return the state as shown to the user."""
        if self.state == "training":
            return "training now"
        return "stopped early" if self.stopped_early else self.state


class RunView:
    """A run's folder. Each file is read on first use, and once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return config.yaml; empty if it cannot be read, which the summary reports."""
        try:
            return read_yaml(self.folder / "config.yaml")
        except BadInput:
            return {}

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Return plan.json, flattened."""
        return read_plan(self.folder)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Return manifest.json."""
        return read_json_object(self.folder / "manifest.json")

    @cached_property
    def tokens_per_step(self) -> int:
        """Return the tokens per optimizer step; 0 if unknown."""
        return count_or_zero(self.plan.get("tokens_per_step"))

    @cached_property
    def history(self) -> History:
        """Return the curves of metrics.jsonl."""
        from gpt2box.runs.history import read_history  # numpy

        return read_history(self.folder / "metrics.jsonl")

    @cached_property
    def latest(self) -> dict[str, dict[str, Any]]:
        """Return the newest row of each kind."""
        return {row["kind"]: row for row in self._read_tail_rows()}

    @cached_property
    def best(self) -> tuple[float, int] | None:
        """Return the lowest val_loss and its step, from the curve or else from the checkpoint."""
        if best := self.history.best():
            return best
        run = self.summary
        return None if run.best_val_loss is None or run.best_step is None else (run.best_val_loss, run.best_step)

    @cached_property
    def summary(self) -> RunSummary:
        """Summarize the run from its small files. A checkpoint's weights are checked by size, not read."""
        state, fault = read_newest_checkpoint(self.folder)
        is_training = is_locked(self.folder / ".lock")
        fault = "" if is_training else (self._find_settings_fault() or fault)
        step = count_or_zero(state.get("step"))
        best, best_step = state.get("best_val_loss"), state.get("best_step")
        has_best = isinstance(best, int | float) and math.isfinite(best)
        rows = [] if has_best and not is_training else self._read_tail_rows()
        seconds = to_number(state.get("seconds")) or 0.0
        if is_training:  # further than its checkpoint
            seconds += training_seconds_after(rows, step, self.tokens_per_step)
            step = max((row["step"] for row in rows), default=step)
        if not has_best:
            evaluated = [row for row in rows if isinstance(row.get("val_loss"), int | float)]
            row = min(evaluated, key=lambda row: row["val_loss"], default={})
            best, best_step = row.get("val_loss"), row.get("step")
        max_steps, stopped_early = count_or_zero(self.plan.get("max_steps")), bool(state.get("stopped_early"))
        is_done = stopped_early or (bool(state) and step >= max_steps > 0 and state.get("evaluated_step") == step)
        return RunSummary(
            name=self.name,
            state="training" if is_training else "damaged" if fault else "finished" if is_done else "stopped",
            fault=fault,
            stopped_early=stopped_early and not is_training and not fault,
            step=step,
            max_steps=max_steps,
            best_val_loss=best,
            best_step=None if best is None else count_or_zero(best_step),
            tokens=step * self.tokens_per_step,
            seconds=round(seconds) if seconds < 1e12 else 0,
            size_bytes=disk_usage_bytes(self.folder),
            changed=last_row_time(self.folder),
        )

    def figures(self) -> dict[str, str]:
        """Format the run's present figures, by name."""
        run, train = self.summary, self.latest.get("train", {})
        figures = {"step": format_step(run.step, run.max_steps)}
        if left := self._time_left():
            figures["time left"] = left
        if run.best_val_loss is not None:
            figures["best val_loss"] = format_loss(run.best_val_loss, run.best_step or 0)
        figures |= format_figures(train, self.latest.get("eval"), to_number(self.plan.get("peak_tflops")) or 0.0)
        figures["tokens seen"] = format_count(run.tokens)
        now = time.time()
        silent_s = now - max((to_number(row.get("time")) or 0.0 for row in self.latest.values()), default=now)
        if run.state == "training" and silent_s > MAX_SILENCE_S:
            figures["last figure"] = f"{format_duration(silent_s)} ago"
        return figures

    def status_line(self) -> str:
        """Format the run's state and present figures as one line."""
        run, figures = self.summary, self.figures()
        if not self.latest:
            return f"{run.name}  {run.state_label}  no step yet"
        line = format_log_line(run.step, run.max_steps, figures, figures.get("time left", ""))
        silent = f"  (last figure {figures['last figure']})" if "last figure" in figures else ""
        return f"{run.name}  {run.state_label}  {line}{silent}"

    def _time_left(self) -> str:
        """Format the time that a run in training still needs at its present rate."""
        run, rate = self.summary, to_number(self.latest.get("train", {}).get("tokens_per_sec"))
        tokens = max(run.max_steps - run.step, 0) * self.tokens_per_step
        return format_duration(tokens / rate) if run.state == "training" and rate and tokens else ""

    def _read_tail_rows(self) -> list[dict[str, Any]]:
        return list(parse_rows(read_tail(self.folder / "metrics.jsonl").splitlines()))

    def _find_settings_fault(self) -> str:
        """Return why the run's settings cannot be read; empty if they can."""
        path = self.folder / "config.yaml"
        try:
            if not read_yaml(path):
                return f"{display_path(path)} is empty"
        except BadInput as error:
            return error.found
        return "" if self.plan else f"{display_path(self.folder / 'plan.json')} is missing or no JSON object"


def training_seconds_after(rows: list[dict[str, Any]], step: int, tokens_per_step: int) -> float:
    """Sum the seconds of training in the train rows after `step`."""
    seconds = 0.0
    for row in rows:
        rate = to_number(row.get("tokens_per_sec")) or 0.0
        if row["kind"] == "train" and row["step"] > step and rate > 0:
            seconds, step = seconds + (row["step"] - step) * tokens_per_step / rate, row["step"]
    return seconds if seconds < 1e12 else 0.0


def read_newest_checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    """Read state.json of the newest checkpoint whose files all have their full size.

    Returns: the state, empty if there is none; and the fault, empty unless every checkpoint is incomplete.
    """
    found = [*list_checkpoints(folder / "checkpoints"), *folder.glob("checkpoints/.step-*.old")]
    for path in sorted(found, key=lambda path: path.name.lstrip("."), reverse=True):
        state = read_json_object(path / "state.json")
        try:
            if all((path / name).stat().st_size == file["bytes"] for name, file in state["files"].items()):
                return state, ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}, f"no whole checkpoint in {display_path(folder / 'checkpoints')}" if found else ""


def disk_usage_bytes(folder: Path) -> int:
    """Sum the disk blocks of a folder's files. Links are not followed."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):  # training replaces checkpoints meanwhile
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def last_row_time(folder: Path) -> float:
    """Return when metrics.jsonl last changed, else when the folder did, in Unix seconds."""
    with suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").stat().st_mtime
    return folder.stat().st_mtime


def as_mapping(value: object) -> dict[str, Any]:
    """Return `value` if it is a mapping, else an empty one: files may hold anything."""
    return value if isinstance(value, dict) else {}
