"""`gpt2box runs`: what the runs in the volume are. It only reads, little of each, also of one that is being trained."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gpt2box.config.loader import read_yaml
from gpt2box.errors import BadInput
from gpt2box.runs.metrics import parse_rows
from gpt2box.runs.plan_file import read_plan
from gpt2box.runs.tail import find_newest_run, read_tail
from gpt2box.utils.files import is_locked, read_object, whole
from gpt2box.utils.paths import checkpoints, run_dir, run_folders, runs_dir, shown
from gpt2box.utils.progress import duration, size

State = Literal["training", "stopped", "finished", "damaged"]


@dataclass(frozen=True)
class RunSummary:
    """A run at a glance. What nothing is known of is None or 0."""

    name: str
    state: State
    fault: str  # of a damaged run
    stopped_early: bool  # finished because it got no better
    step: int  # reached; of a run that is not trained now, that of the checkpoint it would go on from
    max_steps: int
    best_val_loss: float | None
    best_step: int | None
    tokens: int  # seen in so many steps, with repetition
    seconds: int  # of training; of a run that is not trained now, up to the newest checkpoint
    size_bytes: int  # on disk
    changed: float  # when a figure was last noted, in Unix seconds

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "folder": shown(run_dir(self.name))}

    def words(self) -> str:
        """Its state for a person."""
        if self.state == "training":
            return "training now"
        return "stopped early" if self.stopped_early else self.state


def find_run(name: str | None) -> Path:
    """A run's folder by its name; without one, that of the newest.

    Raises:
        BadInput: there is none, with those that there are.
    """
    names = [path.name for path in list_run_folders()]
    if name is None:
        newest = find_newest_run()
        if newest is None:
            raise BadInput(f"no run in {shown(runs_dir())} yet", "a run", "gpt2box train demo")
        return newest
    if name not in names:
        raise BadInput(f"no run {name!r}", f"one of: {', '.join(sorted(names)) or 'none yet'}", "gpt2box runs")
    return runs_dir() / name


def list_run_folders() -> list[Path]:
    """The runs' folders; one in which nothing was begun is none."""
    return [path for path in run_folders() if is_run_folder(path)]


def is_run_folder(folder: Path) -> bool:
    """Whether something is there that a training writes, or one is about to."""
    known = ("config.yaml", "plan.json", "metrics.jsonl", "checkpoints")
    try:
        return any((folder / name).exists() for name in known) or is_locked(folder / ".lock")
    except PermissionError:  # another user's, which they do not show
        return False


def summarize_run(folder: Path) -> RunSummary:
    """A run from its small files alone; a checkpoint's are compared by size, not read."""
    plan = read_plan(folder)
    found, fault = read_newest_checkpoint(folder)
    training = is_locked(folder / ".lock")
    fault = "" if training else (find_settings_fault(folder, plan) or fault)
    step = whole(found.get("step"))
    best, best_step = found.get("best_val_loss"), found.get("best_step")
    measured = isinstance(best, int | float) and math.isfinite(best)
    rows = [] if measured and not training else list(parse_rows(read_tail(folder / "metrics.jsonl").splitlines()))
    if training:  # further than its checkpoint
        step = max((row["step"] for row in rows), default=step)
    max_steps = whole(plan.get("max_steps"))
    if not measured:
        evaluated = [row for row in rows if isinstance(row.get("val_loss"), int | float)]
        row = min(evaluated, key=lambda row: row["val_loss"], default={})
        best, best_step = row.get("val_loss"), row.get("step")
    early = bool(found.get("stopped_early"))
    done = early or (bool(found) and step >= max_steps > 0 and found.get("evaluated_step") == step)
    return RunSummary(
        name=folder.name,
        state="training" if training else "damaged" if fault else "finished" if done else "stopped",
        fault=fault,
        stopped_early=early and not training and not fault,
        step=step,
        max_steps=max_steps,
        best_val_loss=best,
        best_step=None if best is None else whole(best_step),
        tokens=step * whole(plan.get("tokens_per_step")),
        seconds=round(
            number(found.get("seconds")) + training_seconds_after(rows, whole(found.get("step")), plan) * training
        ),
        size_bytes=disk_usage_bytes(folder),
        changed=last_metrics_time(folder),
    )


def training_seconds_after(rows: list[dict[str, Any]], step: int, plan: dict[str, Any]) -> float:
    """Seconds of training in the lines of metrics.jsonl after that step."""
    tokens, seconds = whole(plan.get("tokens_per_step")), 0.0
    for row in rows:
        pace = number(row.get("tokens_per_sec"))
        if row["kind"] == "train" and row["step"] > step and pace > 0:
            seconds, step = seconds + (row["step"] - step) * tokens / pace, row["step"]
    return seconds if seconds < 1e12 else 0.0


def number(value: object) -> float:
    """Of a file that may hold anything; 0 for what is none that a run could have."""
    return float(value) if isinstance(value, int | float) and abs(value) < 2**63 else 0.0


def find_settings_fault(folder: Path, plan: dict[str, Any]) -> str:
    """What keeps a run's settings from being read."""
    try:
        if not read_yaml(folder / "config.yaml"):
            return f"{shown(folder / 'config.yaml')} is empty"
    except BadInput as error:
        return error.found
    return "" if plan else f"{shown(folder / 'plan.json')} is missing or no JSON object"


def read_newest_checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    """state.json of the newest checkpoint whose files are all there, at full size; what is wrong where none is."""
    found = [*checkpoints(folder / "checkpoints"), *folder.glob("checkpoints/.step-*.old")]
    for path in sorted(found, key=lambda path: path.name.lstrip("."), reverse=True):
        state = read_object(path / "state.json")
        try:
            if all((path / name).stat().st_size == file["bytes"] for name, file in state["files"].items()):
                return state, ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}, f"no whole checkpoint in {shown(folder / 'checkpoints')}" if found else ""


def disk_usage_bytes(folder: Path) -> int:
    """Bytes, a link as itself."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):  # it is being trained: a checkpoint was replaced
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def last_metrics_time(folder: Path) -> float:
    """When a figure was last noted, else when the run was begun."""
    with suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").stat().st_mtime
    return folder.stat().st_mtime


def format_table(runs: list[RunSummary]) -> Iterator[str]:
    """A table, newest first; beneath a damaged run what is wrong with it."""
    head = ["run", "state", "step", "best val_loss", "tokens", "time", "disk"]
    rows = [table_cells(run) for run in runs]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for run, row in zip([None, *runs], [head, *rows], strict=True):
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join([*left, *right]).rstrip()
        if run and run.fault:
            yield f"    {run.fault}"


def table_cells(run: RunSummary) -> list[str]:
    """A row of it."""
    return [
        run.name,
        run.words(),
        f"{run.step:,} of {run.max_steps:,}" if run.max_steps else f"{run.step:,}",
        "-" if run.best_val_loss is None else f"{run.best_val_loss:.4f}",
        format_count(run.tokens),
        duration(run.seconds),
        size(run.size_bytes),
    ]


def format_count(count: float) -> str:
    """A number of tokens: 512, 12.3k, 1.15M, 9.04G."""
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{sign}" if count < 1000 * unit else f"{count / unit:,.0f}{sign}"
    return f"{count:.0f}"
