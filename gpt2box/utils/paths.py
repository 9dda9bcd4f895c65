"""Where things are kept. The only module that knows the layout of the volumes.

    volumes/data/NAME/       datasets          volumes/data/raw/   files as downloaded
    volumes/models/NAME/     weights from elsewhere, in the Hugging Face layout
    volumes/runs/NAME/       training runs            volumes/runs/bench.json   what was measured here

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
    """The folder that holds data/, models/ and runs/."""
    return Path(os.environ.get("GPT2BOX_VOLUMES") or "volumes")


def raw_dir() -> Path:
    """Where downloaded files are kept and where a user may put copies."""
    return volumes_dir() / "data" / RAW_NAME


def dataset_dir(name: str) -> Path:
    """The folder of a dataset, by name or, for a folder elsewhere, by a path with a slash."""
    if "/" in name:
        return Path(name)
    return volumes_dir() / "data" / validate_name(name, "dataset")


def dataset_name(given: str) -> str:
    """What a user gives as a dataset: its name, its folder elsewhere, or the text it is made from (named after it)."""
    path = Path(given)
    if text_path(given) or (path.suffix.lower() in (*TEXT_SUFFIXES, *RECORD_SUFFIXES, *COMPRESSION_SUFFIXES)):
        return slugify(stem_of(path))
    return given


def stem_of(path: Path) -> str:
    """A file's name without what its suffixes say of how to read it."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSION_SUFFIXES else path).stem or "text"


def text_path(given: str) -> Path | None:
    """The text that is given in a dataset's place, if that is what it is: a file, or a folder that is no dataset."""
    path = Path(given)
    is_dataset = (path / "train.bin").exists() or (path / "dataset.json").exists()
    known = "/" not in given and (volumes_dir() / "data" / given).is_dir()
    return path if given and path.exists() and not is_dataset and not known else None


def slugify(title: str) -> str:
    """A folder's name from any title; of a title without a Latin letter or digit, a number that stands for it."""
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:80]
    return words or f"text-{zlib.crc32(title.encode()):08x}"


def model_dir(name: str) -> Path:
    """The folder of a model's weights."""
    return volumes_dir() / "models" / validate_name(name, "model")


def runs_dir() -> Path:
    """The folder of all runs."""
    return volumes_dir() / "runs"


def list_run_dirs() -> list[Path]:
    """All folders that are named as runs are; what else lies there is left alone."""
    return [path for path in runs_dir().glob("*/") if NAME_PATTERN.fullmatch(path.name)]


def bench_file() -> Path:
    """What `gpt2box bench --sweep` measured: beside the runs, since a container that trains sees these alone."""
    return runs_dir() / "bench.json"


def run_dir(name: str) -> Path:
    """The folder of a run."""
    return runs_dir() / validate_name(name, "run")


def list_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints by their names, the oldest first. A copy by another name is left to whom it belongs."""
    return sorted(
        (path for path in folder.glob("step-*") if CHECKPOINT_PATTERN.fullmatch(path.name)), key=checkpoint_step
    )


def find_checkpoint(run: Path, which: str) -> Path | None:
    """That of a run, if it is there: for best the last where none is the best, for either the newest without links.

    `which`: best, last or step-N; no other name, which might lead out of the run.
    """
    folder = run / "checkpoints"
    if which not in ("best", "last") and not CHECKPOINT_PATTERN.fullmatch(which):
        return None
    usual = ["best", "last"] if which == "best" else [which]
    newest = list_checkpoints(folder)[-1:] if usual[-1] == "last" else []
    return next((path for path in [*(folder / name for name in usual), *newest] if path.exists()), None)


def checkpoint_step(checkpoint: Path) -> int:
    """By its name."""
    return int(checkpoint.name.removeprefix("step-"))


def validate_name(name: str, kind: str) -> str:
    """The name itself, when it can be a folder's name.

    Raises BadInput: it could leave the volume, hide itself or clash.
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
    """Whether this is the container image, which says so itself."""
    return bool(os.environ.get("GPT2BOX_IMAGE"))


def writable_hint(folder: Path) -> str:
    """The command that makes `folder` writable for the present user."""
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
    """A path as the user knows it: from inside the image, where compose.yaml has it on the host."""
    if in_image() and path.is_relative_to(volumes_dir()):
        return str("volumes" / path.relative_to(volumes_dir()))
    return str(path)
