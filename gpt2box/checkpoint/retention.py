"""The checkpoints of a run: find the newest intact one, delete old ones, set the links `best` and `last`."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from gpt2box.checkpoint.metadata import TrainState, load_verified_state, parse_state, verify_file
from gpt2box.errors import BadInput, Damaged, VolumeUnwritable
from gpt2box.utils.files import fsync_dir, read_text, remove_path
from gpt2box.utils.paths import checkpoint_step, list_checkpoints, writable_hint


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint, such as step-00000500."""
    return f"step-{step:08d}"


def recover_interrupted_saves(folder: Path) -> None:
    """Clean up after a killed save or deletion; a retired checkpoint without its replacement gets its name back."""
    for path in folder.glob(".step-*.old"):
        final = folder / path.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            remove_path(path)
        else:
            os.rename(path, final)
    for path in [*folder.glob(".*.tmp"), *folder.glob("step-*/.*.tmp")]:  # a checkpoint, a link or a state.json
        remove_path(path)


def update_links(folder: Path, state: TrainState) -> None:
    """Set the links `last` and `best` as the state has them."""
    set_link(folder, "last", state.step)
    if (folder / checkpoint_name(state.best_step)).exists():
        set_link(folder, "best", state.best_step)


def set_link(folder: Path, name: str, step: int) -> None:
    """Set `best` or `last` to a checkpoint, atomically.

    A folder of that name is replaced if it is a copy of a checkpoint, made by a copy that resolved links.

    Raises BadInput: there is another folder of that name.
    """
    link = folder / name
    if link.is_dir() and not link.is_symlink():
        if not any(is_same_state(path, link) for path in list_checkpoints(folder)):
            raise BadInput(f"{link} is a folder", "a link to a checkpoint", f"move it elsewhere: mv {link} …")
        shutil.rmtree(link)
    temporary = folder / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint_name(step))
    os.replace(temporary, link)
    fsync_dir(folder)


def is_same_state(one: Path, other: Path) -> bool:
    """Return whether two checkpoints have the same state.json, which includes all checksums."""
    try:
        return read_text(one / "state.json") == read_text(other / "state.json")
    except (OSError, ValueError):
        return False


def delete_old_checkpoints(folder: Path, keep_last: int, state: TrainState, save_interval: int) -> None:
    """Delete old checkpoints.

    Keeps the newest `keep_last`, the best, and two rollback candidates with the best as of each. Checkpoints beyond
    `state.step` are damaged ones that were skipped on resume: they neither count as newest nor are deleted.

    Raises VolumeUnwritable: one could not be deleted.
    """
    steps = [path for path in list_checkpoints(folder) if checkpoint_step(path) <= state.step]
    states = [state, *(candidate for _, candidate in islice(rollback_candidates(steps, save_interval), 2))]
    kept = {checkpoint_name(step) for each in states for step in (each.step, each.best_step)}
    for path in steps[:-keep_last]:
        if path.name not in kept:
            delete_checkpoint(path)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint. Renames it first, so that a crash leaves no torn checkpoint of that name.

    Raises VolumeUnwritable: it could not be deleted.
    """
    retired = path.with_name(f".{path.name}.tmp")
    try:
        os.rename(path, retired)
        remove_path(retired)
    except OSError as error:
        raise VolumeUnwritable(
            f"cannot remove {path}: {error.strerror or error}", next_step=writable_hint(path.parent)
        ) from error


def rollback_candidates(paths: Sequence[Path], save_interval: int) -> Iterator[tuple[Path, TrainState]]:
    """Yield the checkpoints that a run may roll back to after too many bad steps, the newest first.

    These are the ones that an uninterrupted run would have, too, so that both roll back to the same: not those saved
    because of a signal or the clock, nor those whose last step was bad. Their files are not verified.
    """
    for path in reversed(paths):
        try:
            state = parse_state(path)[0]
        except (Damaged, BadInput):
            continue
        if state.bad_steps == 0 and (state.step % save_interval == 0 or state.best_step == state.step):
            yield path, state


def find_intact_config(folder: Path) -> Path | None:
    """Return the newest checkpoint with an intact config.json; if there is none, the newest of all."""
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        with suppress(Damaged):
            verify_file(path / "config.json", **parse_state(path)[1]["config.json"])
            return path
    return paths[-1] if paths else None


def find_newest_checkpoint(folder: Path) -> tuple[Path, TrainState, list[Damaged]] | None:
    """Return the newest intact checkpoint, its state, and the damage of newer ones; None if there are no checkpoints.

    Raises:
        Damaged: there are checkpoints, but none is intact.
        BadInput: a later version of the program wrote it.
        VolumeUnwritable: the folder cannot be read, or the remains of a killed save cannot be deleted.
    """
    if os.path.lexists(folder):
        try:
            os.listdir(folder)  # glob treats an unreadable folder or a broken link as empty
        except OSError as error:
            raise VolumeUnwritable(
                f"cannot read {folder}: {error.strerror}", "the run's checkpoints", "mount their disk, or see ls -ld"
            ) from error
    try:
        recover_interrupted_saves(folder)
    except OSError as error:
        raise VolumeUnwritable(
            f"cannot clean up {folder}: {error.strerror or error}", next_step=writable_hint(folder)
        ) from error
    skipped: list[Damaged] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, load_verified_state(path), skipped
        except Damaged as error:
            skipped.append(error)
    if skipped:
        raise Damaged(
            f"no intact checkpoint in {folder}:\n    " + "\n    ".join(error.found for error in skipped),
            next_step=f"restore one from a backup; to start over: another --name, or remove {folder.parent}",
        )
    return None
