"""state.json of a checkpoint: the training state besides tensors, and size and sha256 of every other file."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from gpt2box.checkpoint.fingerprint import fingerprint_files
from gpt2box.data.downloads import sha256_of
from gpt2box.errors import BadInput, Damaged, describe_error, printable_line
from gpt2box.utils.files import check_regular_file, read_json, write_atomically

FORMAT_VERSION = 4  # 1 had no bad_steps and rollbacks, 2 no recent_losses, 3 no `past` in rollbacks
REQUIRED_FILES = {"config.json", "model.safetensors", "optimizer.safetensors"}
FOLDER_PATTERN = re.compile(r"\.?step-(\d+)(\.tmp|\.old)?", re.ASCII)

Count = Annotated[int, Field(ge=0, lt=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Loss = Annotated[float, Field(ge=-1, le=3.4e38)]  # rounding can give less than 0; the upper bound is float32's
MAX_SKIPPED_STEPS = 10**9  # more than any run has


@dataclass
class Rollback:
    """A return to an earlier checkpoint, from which training skips the data that led to bad steps."""

    step: Count  # of the checkpoint
    left_out: Annotated[Count, Field(le=MAX_SKIPPED_STEPS)]  # number of steps whose data is skipped from there on
    past: Count = 0  # step of a later checkpoint that was given up for this one, else 0


@dataclass
class TrainState:
    """The state of a run besides tensors. All else follows from the step."""

    step: Count = 0
    optimizer_steps: Count = 0  # fewer than `step` if bad steps were skipped
    evaluated_step: int = -1
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int = -1
    evaluations_without_best: Count = 0
    stopped_early: bool = False
    seconds: Annotated[Finite, Field(ge=0)] = 0.0  # of training in all sessions
    bad_steps: Count = 0  # consecutive ones up to this step
    recent_losses: list[Loss] = field(default_factory=list)  # see optim/loss_spikes.py
    rollbacks: list[Rollback] = field(default_factory=list)

    @property
    def data_step(self) -> int:
        """Position of the next step's data, counted in steps: the steps done plus those whose data was skipped."""
        return self.step + sum(rollback.left_out for rollback in self.rollbacks if rollback.step <= self.step)


def write_state(folder: Path, state: TrainState, files: dict[str, Any]) -> None:
    """Write or replace state.json."""
    content = {"format": FORMAT_VERSION, **asdict(state), "digest": fingerprint_files(files), "files": files}
    write_atomically(folder / "state.json", json.dumps(content, indent=2))


@dataclass
class StoredFile:
    """Size and checksum of a file of a checkpoint."""

    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # stays in the folder


@dataclass
class StoredFiles:
    """The fields of state.json besides those of TrainState."""

    files: dict[Name, StoredFile]
    digest: str | None = None  # missing in early checkpoints of format 1


STATE = TypeAdapter(TrainState)
STORED = TypeAdapter(StoredFiles)


def parse_state(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Read state.json: the state, and {"bytes", "sha256"} of each file by name. Converts earlier formats.

    Raises:
        Damaged: it is damaged, or belongs to another checkpoint.
        BadInput: a later version of the program wrote it.
    """
    try:
        content = read_json(folder / "state.json")
        version = content["format"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format {version!r}")
        if version > FORMAT_VERSION:
            raise BadInput(
                f"{folder} was written by a later version of gpt2box: format {version}",
                f"format {FORMAT_VERSION} or earlier",
                f"use the version that manifest.json in {folder.parent.parent} names",
            )
        if version < FORMAT_VERSION:
            content = {"bad_steps": 0, "rollbacks": [], "recent_losses": [], **content}
        values = {each.name: content[each.name] for each in fields(TrainState)}
        state = STATE.validate_json(json.dumps(values), strict=True)
        values = {key: content[key] for key in ("digest", "files") if key in content}
        stored = STORED.validate_json(json.dumps(values), strict=True)
        files = {name: asdict(entry) for name, entry in stored.files.items()}
        check_consistency(folder, state, files, stored.digest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        found = printable_line(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        raise Damaged(f"{folder}/state.json: {found}", "a checkpoint as it was written") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder}: {describe_error(error)}", "a checkpoint as it was written") from error
    return state, files


def check_consistency(folder: Path, state: TrainState, files: dict[str, Any], digest: str | None) -> None:
    """Check that the values of state.json agree with each other and with the folder's name.

    Raises ValueError: which do not.
    """
    match = FOLDER_PATTERN.fullmatch(folder.name)
    if match and int(match[1]) != state.step:
        raise ValueError(f"it is of step {state.step:,}")
    for key in ("optimizer_steps", "evaluated_step", "best_step", "bad_steps"):
        if not -1 <= getattr(state, key) <= state.step:
            raise ValueError(f"{key} {getattr(state, key):,} of step {state.step:,}")
    for rollback in state.rollbacks:
        if rollback.step > state.step:
            raise ValueError(f"a rollback to step {rollback.step:,} of step {state.step:,}")
    if missing := REQUIRED_FILES - files.keys():
        raise ValueError(f"no entry for {', '.join(sorted(missing))}")
    if digest not in (None, fingerprint_files(files)):
        raise ValueError("the digest does not match its files")


def load_verified_state(folder: Path) -> TrainState:
    """Verify every file of a checkpoint and return its state.

    Raises:
        Damaged: which file, and how it differs.
        BadInput: a later version of the program wrote it.
    """
    state, files = parse_state(folder)
    with ThreadPoolExecutor(2) as pool:  # there are two large files
        for _ in pool.map(lambda name: verify_file(folder / name, **files[name]), files):
            pass
    return state


def verify_model_files(folder: Path) -> None:
    """Verify the files of a checkpoint without the optimizer state. Another model folder has no checksums: accept it.

    Raises Damaged: which file, and how it differs.
    """
    if not (folder / "state.json").exists():
        return
    for name, entry in parse_state(folder)[1].items():
        if name != "optimizer.safetensors":
            try:
                verify_file(folder / name, **entry)
            except Damaged as error:
                error.next_step = f"another checkpoint; or, if it was changed on purpose, rm {folder / 'state.json'}"
                raise


def verify_file(path: Path, bytes: int, sha256: str) -> None:
    """Compare a file with its entry in state.json. Raises Damaged: it differs."""
    try:
        check_regular_file(path)
        if path.stat().st_size != bytes:
            raise Damaged(f"{path} has {path.stat().st_size:,} bytes", f"{bytes:,} bytes")
        if sha256_of(path) != sha256:
            raise Damaged(f"{path} has changed since it was written", f"sha256 {sha256}")
    except OSError as error:
        raise Damaged(f"{path}: {describe_error(error)}", "a checkpoint as it was written") from error
