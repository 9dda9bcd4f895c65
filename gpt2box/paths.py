"""Where things are kept. The only module that knows the layout of the volumes.

    volumes/data/NAME/       datasets          volumes/data/raw/   files as downloaded
    volumes/models/NAME/     weights from elsewhere, in the Hugging Face layout
    volumes/runs/NAME/       training runs

$GPT2BOX_VOLUMES moves them all; the default is ./volumes.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2box.errors import BadInput, VolumeUnwritable

RAW = "raw"  # under data/, so no dataset may have this name
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def volumes() -> Path:
    """The folder that holds data/, models/ and runs/."""
    return Path(os.environ.get("GPT2BOX_VOLUMES") or "volumes")


def raw_dir() -> Path:
    """Where downloaded files are kept and where a user may put copies."""
    return volumes() / "data" / RAW


def dataset_dir(name: str) -> Path:
    """The folder of a dataset, by name or, for a folder elsewhere, by a path with a slash."""
    if "/" in name:
        return Path(name)
    return volumes() / "data" / checked_name(name, "dataset")


def model_dir(name: str) -> Path:
    """The folder of a model's weights."""
    return volumes() / "models" / checked_name(name, "model")


def runs_dir() -> Path:
    """The folder of all runs."""
    return volumes() / "runs"


def run_dir(name: str) -> Path:
    """The folder of a run."""
    return runs_dir() / checked_name(name, "run")


def checked_name(name: str, kind: str) -> str:
    """The name itself, when it can be a folder's name.

    Raises:
        BadInput: it could leave the volume, hide itself or clash.
    """
    if not NAME.fullmatch(name) or (kind == "dataset" and name == RAW):
        raise BadInput(
            f"{kind} name {name!r}",
            "letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit"
            + (f", and not {RAW!r}" if kind == "dataset" else ""),
            "choose one with --name",
        )
    return name


def make_writable(folder: Path) -> Path:
    """Create `folder` and its parents.

    Raises:
        VolumeUnwritable: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeUnwritable(
            f"cannot create {folder}: {error.strerror}", "a writable folder", fix_hint(folder)
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VolumeUnwritable(f"{folder} is not writable", f"write permission for uid {os.getuid()}", fix_hint(folder))
    return folder


def fix_hint(folder: Path) -> str:
    """The command that makes `folder` writable for the present user."""
    return f"sudo chown -R {os.getuid()}:{os.getgid()} {folder}, or set GPT2BOX_VOLUMES to another folder"


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the system frees it with the process, however that ends.

    Raises:
        BadInput: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise BadInput(
            f"{what} by another process", next_step="wait for it, stop it, or choose another --name"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def fsync_dir(folder: Path) -> None:
    """Make a rename in `folder` durable (a file's own fsync does not cover its directory entry)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text`; a reader or a crash sees the old content or the new, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_dir(path.parent)
