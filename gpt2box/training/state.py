"""state.json: what a run knows besides tensors, and how each file of a checkpoint was when it was written."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gpt2box.data.assets import sha256_of
from gpt2box.errors import BadInput, Damaged
from gpt2box.paths import write_atomically
from gpt2box.training.digest import digest_of

FORMAT = 4  # 1 had no bad_steps and no rollbacks, 2 no recent_losses, 3 no rollback past another checkpoint


@dataclass
class Rollback:
    """A return to an earlier checkpoint, after which the data go on behind what had led to it."""

    step: int  # of the checkpoint
    left_out: int  # steps' worth of data that are passed over from there on
    past: int = 0  # the step of a later one that was given up for it; 0 where it was the latest


@dataclass
class TrainState:
    """What a run knows besides tensors. All else follows from the step."""

    step: int = 0
    optimizer_steps: int = 0  # less than step where bad steps were left out
    evaluated_step: int = -1
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int = -1
    evaluations_without_best: int = 0
    stopped_early: bool = False
    seconds: float = 0.0  # of training, over all sessions
    bad_steps: int = 0  # in a row, up to this step
    recent_losses: list[float] = field(default_factory=list)  # that the next step's is compared with (bad_steps.py)
    rollbacks: list[Rollback] = field(default_factory=list)

    @property
    def data_step(self) -> int:
        """Where the next step's data are, counted in steps: behind the steps done and what was passed over."""
        return self.step + sum(rollback.left_out for rollback in self.rollbacks if rollback.step <= self.step)


def write_state(folder: Path, state: TrainState, files: dict[str, Any]) -> None:
    """state.json, or another in its place."""
    content = {"format": FORMAT, **asdict(state), "digest": digest_of(files), "files": files}
    write_atomically(folder / "state.json", json.dumps(content, indent=2))


def parse_state(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """state.json of a checkpoint, and what it says of the other files. An earlier format's is brought up to date.

    Raises:
        Damaged: it is not what was written.
        BadInput: a later version of the program wrote it.
    """
    try:
        content: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        found = int(content["format"])
        if found > FORMAT:
            raise BadInput(
                f"{folder} was written by a later version of gpt2box: format {found}",
                f"format {FORMAT} or earlier",
                f"go on with the version that manifest.json in {folder.parent.parent} names",
            )
        content = {"bad_steps": 0, "rollbacks": [], "recent_losses": [], **content} if found < FORMAT else content
        state = TrainState(**{field.name: content[field.name] for field in fields(TrainState)})
        state.rollbacks = [
            Rollback(*(int(entry.get(key, 0) if key == "past" else entry[key]) for key in ("step", "left_out", "past")))
            for entry in content["rollbacks"]
        ]
        state.recent_losses = [float(loss) for loss in content["recent_losses"]]
        described = {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in content["files"].items()
        }
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder}: {error!r}", "a checkpoint as it was written") from error
    return state, described


def read_state(folder: Path) -> TrainState:
    """state.json of a checkpoint, after checking every file it names; on as many cores as there are large files.

    Raises:
        Damaged: which file, and how it differs.
        BadInput: a later version of the program wrote it.
    """
    state, described = parse_state(folder)
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda name: check_file(folder / name, **described[name]), described):
            pass
    return state


def check_file(path: Path, bytes: int, sha256: str) -> None:
    """Compare one file with what state.json says of it.

    Raises:
        Damaged: it differs.
    """
    try:
        if path.stat().st_size != bytes:
            raise Damaged(f"{path} has {path.stat().st_size:,} bytes", f"{bytes:,} bytes")
        if sha256_of(path) != sha256:
            raise Damaged(f"{path} has other content than was written", f"sha256 {sha256}")
    except OSError as error:
        raise Damaged(f"{path}: {error!r}", "a checkpoint as it was written") from error
