"""The checkpoints that a run keeps: which is whole, which goes, where `best` and `last` point."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from gpt2box.checkpoint.metadata import TrainState, check_file, parse_state, read_state
from gpt2box.errors import BadInput, Damaged, VolumeUnwritable
from gpt2box.utils.files import discard, fsync_dir, read_text
from gpt2box.utils.paths import checkpoints, fix_hint, step_of


def folder_name(step: int) -> str:
    """step-00000500."""
    return f"step-{step:08d}"


def recover(folder: Path) -> None:
    """Undo what a killed save or prune left half-way: an older copy without its successor gets its name back."""
    for path in folder.glob(".step-*.old"):
        final = folder / path.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            discard(path)
        else:
            os.rename(path, final)
    for path in [*folder.glob(".*.tmp"), *folder.glob("step-*/.*.tmp")]:  # also of a link or of a state
        discard(path)


def point_to_last_and_best(folder: Path, state: TrainState) -> None:
    """Make the links agree with the state."""
    point(folder, "last", state.step)
    if (folder / folder_name(state.best_step)).exists():
        point(folder, "best", state.best_step)


def point(folder: Path, name: str, step: int) -> None:
    """Make `best` or `last` a link to a checkpoint, replaced at once.

    Raises:
        BadInput: a folder is there that is not a copy of a checkpoint beside it, as copying without links makes it.
    """
    there = folder / name
    if there.is_dir() and not there.is_symlink():
        twins = [path for path in checkpoints(folder) if same_state(path, there)]
        if not twins:
            raise BadInput(f"{there} is a folder", "a link to a checkpoint", f"move it elsewhere: mv {there} …")
        shutil.rmtree(there)
    temporary = folder / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder_name(step))
    os.replace(temporary, folder / name)
    fsync_dir(folder)


def same_state(one: Path, other: Path) -> bool:
    """Whether two checkpoints say the same, checksums and all."""
    try:
        return read_text(one / "state.json") == read_text(other / "state.json")
    except (OSError, ValueError):
        return False


def prune(folder: Path, keep_last: int, state: TrainState, save_interval: int) -> None:
    """Remove all but the newest `keep_last` checkpoints, the best, and those to go back to (see `anchors`), with the
    best that a run has when it has gone back.

    Those beyond `state.step` are damaged ones that were passed over: they do not count as newest.

    Raises:
        VolumeUnwritable: which could not be removed.
    """
    steps = [path for path in checkpoints(folder) if step_of(path) <= state.step]
    states = [state, *(anchor for _, anchor in islice(anchors(steps, save_interval), 2))]
    wanted = {folder_name(step) for each in states for step in (each.step, each.best_step)}
    for path in steps[:-keep_last]:
        if path.name not in wanted:
            remove(path)


def remove(path: Path) -> None:
    """Out of sight first, so that a crash half-way leaves no torn checkpoint by that name.

    Raises:
        VolumeUnwritable: it could not be removed.
    """
    retired = path.with_name(f".{path.name}.tmp")
    try:
        os.rename(path, retired)
        discard(retired)
    except OSError as error:
        raise VolumeUnwritable(
            f"cannot remove {path}: {error.strerror or error}", next_step=fix_hint(path.parent)
        ) from error


def anchors(paths: Sequence[Path], save_interval: int) -> Iterator[tuple[Path, TrainState]]:
    """Those of `paths`, the newest first, that a run whose numbers are no longer finite may go back to.

    Ones that an uninterrupted run would have, too, so that it goes back to the same: not those that a signal or the
    clock had written. And no bad step was their last. Their files are not checked.
    """
    for path in reversed(paths):
        try:
            state = parse_state(path)[0]
        except (Damaged, BadInput):
            continue
        if state.bad_steps == 0 and (state.step % save_interval == 0 or state.best_step == state.step):
            yield path, state


def newest_config(folder: Path) -> Path | None:
    """The newest checkpoint whose config.json is as it was written; the newest of all where none is."""
    found = checkpoints(folder)
    for path in reversed(found):
        with suppress(Damaged):
            check_file(path / "config.json", **parse_state(path)[1]["config.json"])
            return path
    return found[-1] if found else None


def newest(folder: Path) -> tuple[Path, TrainState, list[Damaged]] | None:
    """The newest whole checkpoint, its state, and what was wrong with newer ones; None where there is none at all.

    Raises:
        Damaged: there are checkpoints, and not one is whole.
        BadInput: a later version of the program wrote it.
        VolumeUnwritable: the folder is there and cannot be read, or what a killed save left cannot be tidied up.
    """
    if os.path.lexists(folder):
        try:
            os.listdir(folder)  # glob takes one that it may not read, or a link that leads nowhere, for an empty one
        except OSError as error:
            raise VolumeUnwritable(
                f"cannot read {folder}: {error.strerror}", "the run's checkpoints", "mount their disk, or see ls -ld"
            ) from error
    try:
        recover(folder)
    except OSError as error:
        raise VolumeUnwritable(
            f"cannot tidy up {folder}: {error.strerror or error}", next_step=fix_hint(folder)
        ) from error
    passed_over: list[Damaged] = []
    for path in reversed(checkpoints(folder)):
        try:
            return path, read_state(path), passed_over
        except Damaged as fault:
            passed_over.append(fault)
    if passed_over:
        raise Damaged(
            f"no whole checkpoint in {folder}:\n    " + "\n    ".join(fault.found for fault in passed_over),
            next_step=f"restore one from a backup; to begin anew: another --name, or remove {folder.parent}",
        )
    return None
