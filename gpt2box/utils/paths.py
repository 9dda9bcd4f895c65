"""Locate datasets, models and runs. Only this module knows the layout of the volumes.

    volumes/data/NAME/       datasets          volumes/data/raw/   files as downloaded
    volumes/models/NAME/     weights from elsewhere, in the Hugging Face layout
    volumes/runs/NAME/       training runs            volumes/runs/bench.json   measurements of this machine

$GPT2BOX_VOLUMES moves them all; the default is ./volumes.
"""

import os
import re
import unicodedata
import zlib
from pathlib import Path

from gpt2box.errors import BadInput, VolumeUnwritable

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
RAW_NAME = "raw"  # under data/, so no dataset may have this name
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CHECKPOINT_PATTERN = re.compile(r"step-(\d{8}|[1-9]\d{8,14})", re.ASCII)


def volumes_dir() -> Path:
    """Return the folder that holds data/, models/ and runs/."""
    return Path(os.environ.get("GPT2BOX_VOLUMES") or "volumes")


def raw_dir() -> Path:
    """Return the folder of downloaded files, where a user may also put copies."""
    return volumes_dir() / "data" / RAW_NAME


def dataset_dir(name: str) -> Path:
    """Return a dataset's folder. `name` is its name or, outside the volumes, a path with a slash."""
    if "/" in name:
        return Path(name)
    return volumes_dir() / "data" / validate_name(name, "dataset")


def dataset_name(given: str) -> str:
    """Return the dataset's name or folder that the user gave; for a text, a name made from its file name."""
    path = Path(given)
    if text_path(given) or (path.suffix.lower() in (*TEXT_SUFFIXES, *RECORD_SUFFIXES, *COMPRESSION_SUFFIXES)):
        return slugify(stem_of(path))
    return given


def stem_of(path: Path) -> str:
    """Return a file's name without the suffixes of its format and compression."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSION_SUFFIXES else path).stem or "text"


def text_path(given: str) -> Path | None:
    """Return the path if the user gave a text in place of a dataset, else None.

    A text is a file, or a folder that is not a dataset.
    """
    path = Path(given)
    is_dataset = (path / "train.bin").exists() or (path / "dataset.json").exists()
    known = "/" not in given and (volumes_dir() / "data" / given).is_dir()
    return path if given and path.exists() and not is_dataset and not known else None


def slugify(title: str) -> str:
    """Turn a title into a folder name; a title without a Latin letter or digit becomes a checksum."""
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:80]
    return words or f"text-{zlib.crc32(title.encode()):08x}"


def model_dir(name: str) -> Path:
    """Return the folder of a model's weights."""
    return volumes_dir() / "models" / validate_name(name, "model")


def runs_dir() -> Path:
    """Return the folder of all runs."""
    return volumes_dir() / "runs"


def list_run_dirs() -> list[Path]:
    """List the folders whose names are valid run names; ignore everything else."""
    return [path for path in runs_dir().glob("*/") if NAME_PATTERN.fullmatch(path.name)]


def bench_file() -> Path:
    """Return the path of the measurements of `gpt2box bench --sweep`.

    It lies in runs/, the only one of the three volumes that a training container may write.
    """
    return runs_dir() / "bench.json"


def run_dir(name: str) -> Path:
    """Return a run's folder."""
    return runs_dir() / validate_name(name, "run")


def list_checkpoints(folder: Path) -> list[Path]:
    """List a run's checkpoints, oldest first. Copies with other names are ignored."""
    return sorted(
        (path for path in folder.glob("step-*") if CHECKPOINT_PATTERN.fullmatch(path.name)), key=checkpoint_step
    )


def find_checkpoint(run: Path, which: str) -> Path | None:
    """Return a run's checkpoint, or None. `best` falls back to `last`, and both to the newest if the links are missing.

    `which`: best, last or step-N; any other name could point outside the run.
    """
    folder = run / "checkpoints"
    if which not in ("best", "last") and not CHECKPOINT_PATTERN.fullmatch(which):
        return None
    usual = ["best", "last"] if which == "best" else [which]
    newest = list_checkpoints(folder)[-1:] if usual[-1] == "last" else []
    return next((path for path in [*(folder / name for name in usual), *newest] if path.exists()), None)


def checkpoint_step(checkpoint: Path) -> int:
    """Parse the step from a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def validate_name(name: str, kind: str) -> str:
    """Return the name if it is valid as a folder name.

    Raises BadInput: it could point outside the volume, is hidden, or is reserved.
    """
    if not NAME_PATTERN.fullmatch(name) or (kind == "dataset" and name == RAW_NAME):
        raise BadInput(
            f"{kind} name {name!r}",
            "letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit"
            + (f", and not {RAW_NAME!r}" if kind == "dataset" else ""),
            "choose one with --name",
        )
    return name


def ensure_writable(folder: Path) -> Path:
    """Create `folder` and its parents.

    Raises VolumeUnwritable: it cannot be created or written, or would be lost with the container.
    """
    needs_mount = in_image() and folder.is_relative_to(volumes_dir())
    if needs_mount and not any(map(os.path.ismount, [folder, *folder.parents][:-1])):
        raise VolumeUnwritable(
            f"nothing is mounted at {volumes_dir()}: what is written there would be lost with the container",
            "a folder of the host",
            f'mkdir -p volumes && docker run -v "$PWD/volumes:{volumes_dir()}" --user "$(id -u):$(id -g)" …',
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeUnwritable(
            f"cannot create {folder}: {error.strerror}", "a writable folder", writable_hint(folder)
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VolumeUnwritable(
            f"{folder} is not writable", f"write permission for uid {os.getuid()}", writable_hint(folder)
        )
    return folder


def in_image() -> bool:
    """Return True in the container image, which sets a variable."""
    return bool(os.environ.get("GPT2BOX_IMAGE"))


def writable_hint(folder: Path) -> str:
    """Return the command that makes `folder` writable for the current user."""
    there = next((part for part in [folder, *folder.parents] if part.exists()), folder)
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        return f"{folder} is on a read-only file system or mount: mount it for writing"
    owner = f"{os.getuid()}:{os.getgid()}"
    if not in_image():
        return f"sudo chown -R {owner} {there}, or set GPT2BOX_VOLUMES to another folder"
    state = there.stat()
    hint = f"on the host: sudo chown -R {owner} {display_path(there)}"
    return hint + (f"; or start with --user {state.st_uid}:{state.st_gid}, who owns it" if state.st_uid else "")


def display_path(path: Path) -> str:
    """Return a path as the user knows it: inside the image, the path that compose.yaml mounts from the host."""
    if in_image() and path.is_relative_to(volumes_dir()):
        return str("volumes" / path.relative_to(volumes_dir()))
    return str(path)
