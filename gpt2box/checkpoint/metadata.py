"""state.json: what a run knows besides tensors, and how each file of a checkpoint was when it was written."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from gpt2box.checkpoint.fingerprint import digest_of
from gpt2box.data.downloads import sha256_of
from gpt2box.errors import BadInput, Damaged, printable, why
from gpt2box.utils.files import check_regular, read_json, write_atomically

FORMAT = 4  # 1 had no bad_steps and no rollbacks, 2 no recent_losses, 3 no rollback past another checkpoint
PARTS = {"config.json", "model.safetensors", "optimizer.safetensors"}  # without which there is no checkpoint
FOLDER = re.compile(r"\.?step-(\d+)(\.tmp|\.old)?", re.ASCII)

Count = Annotated[int, Field(ge=0, lt=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Loss = Annotated[float, Field(ge=-1, le=3.4e38)]  # below 0 by rounding alone; as much as float32 holds
MOST_LEFT_OUT = 10**9  # steps' worth of data, behind which there is no run's


@dataclass
class Rollback:
    """A return to an earlier checkpoint, after which the data go on behind what had led to it."""

    step: Count  # of the checkpoint
    left_out: Annotated[Count, Field(le=MOST_LEFT_OUT)]  # steps' worth of data that are passed over from there on
    past: Count = 0  # the step of a later one that was given up for it; 0 where it was the latest


@dataclass
class TrainState:
    """What a run knows besides tensors. All else follows from the step."""

    step: Count = 0
    optimizer_steps: Count = 0  # less than step where bad steps were left out
    evaluated_step: int = -1
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int = -1
    evaluations_without_best: Count = 0
    stopped_early: bool = False
    seconds: Annotated[Finite, Field(ge=0)] = 0.0  # of training, over all sessions
    bad_steps: Count = 0  # in a row, up to this step
    recent_losses: list[Loss] = field(default_factory=list)  # that the next step's is compared with (bad_steps.py)
    rollbacks: list[Rollback] = field(default_factory=list)

    @property
    def data_step(self) -> int:
        """Where the next step's data are, counted in steps: behind the steps done and what was passed over."""
        return self.step + sum(rollback.left_out for rollback in self.rollbacks if rollback.step <= self.step)


def write_state(folder: Path, state: TrainState, files: dict[str, Any]) -> None:
    """state.json, or another in its place."""
    content = {"format": FORMAT, **asdict(state), "digest": digest_of(files), "files": files}
    write_atomically(folder / "state.json", json.dumps(content, indent=2))


@dataclass
class StoredFile:
    """A file of a checkpoint, as it was written."""

    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # leads nowhere else


@dataclass
class Stored:
    """What state.json says beside a TrainState's fields."""

    files: dict[Name, StoredFile]
    digest: str | None = None  # there was none in the first format's beginning


STATE = TypeAdapter(TrainState)
STORED = TypeAdapter(Stored)


def parse_state(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """state.json of a checkpoint, and what it says of the other files. An earlier format's is brought up to date.

    Raises:
        Damaged: it is not what was written, or of another checkpoint.
        BadInput: a later version of the program wrote it.
    """
    try:
        content = read_json(folder / "state.json")
        found = content["format"]
        if type(found) is not int or found < 1:
            raise ValueError(f"format {found!r}")
        if found > FORMAT:
            raise BadInput(
                f"{folder} was written by a later version of gpt2box: format {found}",
                f"format {FORMAT} or earlier",
                f"go on with the version that manifest.json in {folder.parent.parent} names",
            )
        if found < FORMAT:
            content = {"bad_steps": 0, "rollbacks": [], "recent_losses": [], **content}
        own = {each.name: content[each.name] for each in fields(TrainState)}
        state = STATE.validate_json(json.dumps(own), strict=True)
        of_files = {key: content[key] for key in ("digest", "files") if key in content}
        stored = STORED.validate_json(json.dumps(of_files), strict=True)
        files = {name: asdict(about) for name, about in stored.files.items()}
        check_together(folder, state, files, stored.digest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        raise Damaged(f"{folder}/state.json: {what}", "a checkpoint as it was written") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder}: {why(error)}", "a checkpoint as it was written") from error
    return state, files


def check_together(folder: Path, state: TrainState, files: dict[str, Any], digest: str | None) -> None:
    """What its numbers and names say of each other.

    Raises:
        ValueError: what does not go together.
    """
    named = FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != state.step:
        raise ValueError(f"it is of step {state.step:,}")
    for key in ("optimizer_steps", "evaluated_step", "best_step", "bad_steps"):
        if not -1 <= getattr(state, key) <= state.step:
            raise ValueError(f"{key} {getattr(state, key):,} of step {state.step:,}")
    for rollback in state.rollbacks:
        if rollback.step > state.step:
            raise ValueError(f"a rollback to step {rollback.step:,} of step {state.step:,}")
    if missing := PARTS - files.keys():
        raise ValueError(f"nothing is said of {', '.join(sorted(missing))}")
    if digest not in (None, digest_of(files)):
        raise ValueError("the digest is not that of its files")


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


def check_model(folder: Path) -> None:
    """Of a checkpoint, all but what only training needs; any other folder says nothing of itself.

    Raises:
        Damaged: which file, and how it differs.
    """
    if not (folder / "state.json").exists():
        return
    for name, about in parse_state(folder)[1].items():
        if name != "optimizer.safetensors":
            try:
                check_file(folder / name, **about)
            except Damaged as fault:
                fault.next_step = f"another checkpoint; or, if it was changed on purpose, rm {folder / 'state.json'}"
                raise


def check_file(path: Path, bytes: int, sha256: str) -> None:
    """Compare one file with what state.json says of it.

    Raises:
        Damaged: it differs.
    """
    try:
        check_regular(path)
        if path.stat().st_size != bytes:
            raise Damaged(f"{path} has {path.stat().st_size:,} bytes", f"{bytes:,} bytes")
        if sha256_of(path) != sha256:
            raise Damaged(f"{path} has other content than was written", f"sha256 {sha256}")
    except OSError as error:
        raise Damaged(f"{path}: {why(error)}", "a checkpoint as it was written") from error
