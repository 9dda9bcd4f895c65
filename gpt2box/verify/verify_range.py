"""Select the steps that `gpt2box verify` repeats, and the records to compare them with."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2box.checkpoint.retention import checkpoint_name
from gpt2box.config import loader
from gpt2box.config.schema import Config
from gpt2box.config.validation import validate
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
from gpt2box.utils.paths import checkpoint_step, list_checkpoints

DEFAULT_STEPS = 20  # if neither --from nor --steps is given


@dataclass
class StepRange:
    """Consecutive steps of a run, how they were executed, and their records."""

    run: Path
    config: Config  # the settings of these steps
    session: dict[str, Any]  # the session that executed the first of them
    ways: dict[int, dict[str, Any]]  # later changes of the execution plan, by step
    start: int
    end: int
    digests: dict[int, str]  # fingerprints in metrics.jsonl, by step
    checkpoints: dict[int, Path]

    @property
    def steps(self) -> list[int]:
        """Return the steps that have a fingerprint or a checkpoint."""
        return sorted(self.digests.keys() | self.checkpoints.keys())


def find_step_range(run: Path, start_at: str | None, steps: int | None) -> StepRange:
    """Select the steps from the checkpoint `start_at` (or the beginning) and collect their records.

    Raises BadInput: there is no such checkpoint, or no record to compare with.
    """
    folders = {checkpoint_step(path): path for path in list_checkpoints(run / "checkpoints")}
    start = 0
    if start_at is not None:
        matched = re.fullmatch(r"(?:step-)?(\d{1,8})", start_at)
        start = int(matched[1]) if matched else -1
        if start not in folders:
            raise BadInput(f"no checkpoint {start_at} in {run}", f"one of: {format_names(folders)}")
    config, session, ways, limit = execution_after(run, start)
    later = sorted(step for step in folders if start < step <= limit)
    if steps is not None:
        end = min(start + steps, limit)
    else:
        end = later[0] if start_at is not None and later else min(start + DEFAULT_STEPS, limit)
    rows = metrics.iter_rows(run / "metrics.jsonl")
    digests = {row["step"]: str(row["digest"]) for row in rows if row["kind"] == "train" and row.get("digest")}
    recorded = sorted(digests.keys() | folders.keys())
    digests = {step: digest for step, digest in digests.items() if start < step <= end}
    compared = {step: folders[step] for step in later if step <= end}
    if not digests and not compared:
        earlier = sorted((step for step in folders if step < start), reverse=True)
        kept = format_names(folders)
        raise BadInput(
            f"{run.name}: nothing is recorded of its steps {start + 1:,} to {end:,}",
            f"a digest, each log_interval of {config.log_interval} steps, or a checkpoint; kept: {kept}",
            suggest_command(run, [start, *earlier, 0], recorded),
        )
    return StepRange(run, config, session, ways, start, end, digests, compared)


def format_names(folders: dict[int, Path]) -> str:
    """Return the checkpoints' names for a message."""
    return ", ".join(folders[step].name for step in sorted(folders)) or "none"


def execution_after(run: Path, start: int) -> tuple[Config, dict[str, Any], dict[int, dict[str, Any]], int]:
    """Return how the steps after `start` were executed: settings, session, later changes of the execution plan, limit.

    From the limit on, a later session changed something else, so that its steps cannot be repeated in one go.

    Raises BadInput: the run has no record of its sessions.
    """
    sessions = valid_sessions(read_manifest(run))
    if not sessions or not (run / "config.yaml").is_file():
        raise BadInput(
            f"{run} has no record of how its steps were executed", "config.yaml and manifest.json of this version"
        )
    start_steps, session = session_start_steps(sessions), session_at_step(sessions, start)
    values = loader.read_yaml(run / "config.yaml")
    limit = int(validate(values, str(run / "config.yaml")).max_steps)
    for later, step in reversed(list(zip(sessions, start_steps, strict=True))):
        if step > start:
            values |= later["changed"]
            same_execution = {**later, "way": execution_changes(later)[0][1] | changeable_execution(session["way"])}
            if (
                session_differences(session, same_execution, bits_only=True)
                or CHANGEABLE_SETTINGS & later["changed"].keys()
            ):
                limit = step
    return validate(values, str(run / "manifest.json")), session, execution_changes_after(sessions, start), limit


def suggest_command(run: Path, starts: list[int], recorded: list[int]) -> str:
    """Return a verify command for the first of `starts` after which a step is recorded, or ""."""
    for start in starts:
        limit = execution_after(run, start)[3]
        if step := next((step for step in recorded if start < step <= limit), 0):
            return verify_command(run, start, step)
    return ""


def verify_command(run: Path, start: int, end: int) -> str:
    """Return the verify command for these steps."""
    return f"gpt2box verify {run.name}{f' --from {checkpoint_name(start)}' if start else ''} --steps {end - start}"
