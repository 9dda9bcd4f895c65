"""Which steps of a run `gpt2box verify` does again: with what they were done, and what they can be compared with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2box.checkpoint.retention import checkpoint_name
from gpt2box.config import loader
from gpt2box.config.schema import Config, validate
from gpt2box.errors import BadInput
from gpt2box.runs import metrics
from gpt2box.runs.manifest import read_manifest
from gpt2box.runs.sessions import (
    CHANGEABLE_SETTINGS,
    changeable_execution,
    execution_changes,
    execution_changes_after,
    session_at_step,
    session_differences,
    session_start_steps,
    valid_sessions,
)
from gpt2box.utils.paths import checkpoints, step_of

FIRST_STEPS = 20  # where neither --from nor --steps says how many


@dataclass
class Stretch:
    """Steps of a run, and what it kept of them."""

    run: Path
    config: Config  # as it was then
    session: dict[str, Any]  # that did them
    ways: dict[int, dict[str, Any]]  # in which it, or a later one, went on, by the step from which on
    start: int
    end: int
    digests: dict[int, str]  # by step
    checkpoints: dict[int, Path]

    @property
    def steps(self) -> list[int]:
        """At which something can be compared."""
        return sorted(self.digests.keys() | self.checkpoints.keys())


def stretch_of(run: Path, start_at: str | None, steps: int | None) -> Stretch:
    """Which steps, and what there is to compare them with.

    Raises:
        BadInput: no such checkpoint, or nothing to compare with.
    """
    folders = {step_of(path): path for path in checkpoints(run / "checkpoints")}
    start = 0
    if start_at is not None:
        matched = re.fullmatch(r"(?:step-)?(\d{1,8})", start_at)
        start = int(matched[1]) if matched else -1
        if start not in folders:
            raise BadInput(f"no checkpoint {start_at} in {run}", f"one of: {listed(folders)}")
    config, session, ways, limit = then(run, start)
    later = sorted(step for step in folders if start < step <= limit)
    if steps is not None:
        end = min(start + steps, limit)
    else:
        end = later[0] if start_at is not None and later else min(start + FIRST_STEPS, limit)
    rows = metrics.iter_rows(run / "metrics.jsonl")
    digests = {row["step"]: str(row["digest"]) for row in rows if row["kind"] == "train" and row.get("digest")}
    recorded = sorted(digests.keys() | folders.keys())
    digests = {step: digest for step, digest in digests.items() if start < step <= end}
    compared = {step: folders[step] for step in later if step <= end}
    if not digests and not compared:
        raise BadInput(
            f"{run.name}: nothing is recorded of its steps {start + 1:,} to {end:,}",
            f"a digest, each log_interval of {config.log_interval} steps, or a checkpoint; kept: {listed(folders)}",
            that_works(run, [start, *sorted((step for step in folders if step < start), reverse=True), 0], recorded),
        )
    return Stretch(run, config, session, ways, start, end, digests, compared)


def listed(folders: dict[int, Path]) -> str:
    """Checkpoints in a message."""
    return ", ".join(folders[step].name for step in sorted(folders)) or "none"


def then(run: Path, start: int) -> tuple[Config, dict[str, Any], dict[int, dict[str, Any]], int]:
    """Settings and session of the step after `start`, the ways that steps after it were done in, and the last step
    before another session did otherwise than in another of these ways.

    Raises:
        BadInput: the run keeps no account of its sessions.
    """
    sessions = valid_sessions(read_manifest(run))
    if not sessions or not (run / "config.yaml").is_file():
        raise BadInput(
            f"{run} does not say what its steps were done with", "config.yaml and manifest.json of this version"
        )
    began, session = session_start_steps(sessions), session_at_step(sessions, start)
    values = loader.read_yaml(run / "config.yaml")
    limit = int(validate(values, str(run / "config.yaml")).max_steps)
    for each, step in reversed(list(zip(sessions, began, strict=True))):
        if step > start:
            values |= each["changed"]
            same_way = {**each, "way": execution_changes(each)[0][1] | changeable_execution(session["way"])}
            if session_differences(session, same_way, of_bits=True) or CHANGEABLE_SETTINGS & each["changed"].keys():
                limit = step
    return validate(values, str(run / "manifest.json")), session, execution_changes_after(sessions, start), limit


def that_works(run: Path, starts: list[int], recorded: list[int]) -> str:
    """The command for steps after one of `starts` of which something is kept; nothing where there are none."""
    for start in starts:
        limit = then(run, start)[3]
        if step := next((step for step in recorded if start < step <= limit), 0):
            return command(run, start, step)
    return ""


def command(run: Path, start: int, end: int) -> str:
    """To do these steps again."""
    return f"gpt2box verify {run.name}{f' --from {checkpoint_name(start)}' if start else ''} --steps {end - start}"
