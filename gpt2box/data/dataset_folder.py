"""Publish a dataset folder with one rename, and check it against its manifest."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpt2box
from gpt2box.data import downloads
from gpt2box.data.dataset import ID_BYTES, SPLITS
from gpt2box.data.tokenizer import Tokenizer, vocabulary_digest
from gpt2box.errors import BadInput, Damaged, VolumeUnwritable
from gpt2box.utils.files import file_lock, fsync_dir, read_json_object
from gpt2box.utils.paths import ensure_writable, writable_hint
from gpt2box.utils.progress import log_line

SPLIT_SEED = 2357  # nanoGPT's, for OpenWebText
MIN_SPLIT_TOKENS = 64  # tokens of a split without which no loss means anything
MIN_DOCUMENTS_TO_HOLD_OUT = 10  # from this many on, whole documents are held out
FILES = {"train.bin", "val.bin", "train.mask", "val.mask", "dataset.json", "tokenizer"}

PreparedDataset = tuple[dict[str, Any], bool]  # the manifest, and whether anything was written


def publish_dataset(
    folder: Path, identity: dict[str, Any], write: Callable[[Path], dict[str, Any]], resumable: bool
) -> PreparedDataset:
    """Write the dataset to `folder` unless it is already there with the same identity.

    The identity (inputs, choices) determines every byte. `write` fills a temporary folder and returns the rest of the
    manifest; if `resumable`, the temporary folder survives an interruption.

    Raises:
        BadInput: `folder` is not a dataset, another process is writing it, or as `write` raises.
        VolumeUnwritable: no space or no permission.
    """
    identity = json.loads(json.dumps(identity))
    of_bytes = {key: value for key, value in identity.items() if key != "source"}  # a path may be spelled otherwise
    digest = hashlib.sha256(json.dumps(of_bytes, sort_keys=True).encode()).hexdigest()[:8]
    retired, temporary = (folder.parent / f".{folder.name}.{suffix}" for suffix in ("old", f"{digest}.tmp"))
    if not retired.exists() and (present := load_matching_manifest(folder, of_bytes)):
        return present, False
    ensure_writable(folder.parent)
    with file_lock(folder.parent / f".{folder.name}.lock", f"the dataset {folder.name} is being made"):
        if retired.exists() and not folder.exists():  # killed between publish's two renames
            os.rename(retired, folder)
        check_replaceable(folder)
        shutil.rmtree(retired, ignore_errors=True)
        if present := load_matching_manifest(folder, of_bytes):
            return present, False
        others = [path for path in folder.parent.glob(f".{folder.name}.????????.tmp") if path != temporary]
        if not resumable:
            shutil.rmtree(temporary, ignore_errors=True)
        elif (temporary / "progress.json").exists():
            log_line(f"going on with {folder.name} where it was")
        elif others:
            log_line(
                f"note: {others[0]} is unfinished work on {folder.name} as asked for before; kept until this is done"
            )
        try:
            temporary.mkdir(exist_ok=True)
            manifest = load_matching_manifest(temporary, of_bytes)
            if not manifest:  # else it was ended just before the last rename
                manifest = identity | write(temporary)
                write_manifest(temporary / "dataset.json", manifest)
            for name in {path.name for path in temporary.iterdir()} - FILES:
                (temporary / name).unlink()
            replace_folder(temporary, folder, retired)
            for path in others:
                shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            found = f"cannot write {folder}: {error.strerror or error}"
            expected = "free space" + ("; it goes on where it was" if resumable else "")
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            more_space = "free space, or set GPT2BOX_VOLUMES to a folder on a larger disk"
            raise VolumeUnwritable(found, expected, more_space if full else writable_hint(folder)) from error
        finally:
            if not resumable:
                shutil.rmtree(temporary, ignore_errors=True)
    return manifest, True


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write dataset.json. File names that are not UTF-8 are escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def load_matching_manifest(folder: Path, of_bytes: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of an undamaged dataset with this identity, else an empty one."""
    manifest = read_manifest(folder)
    same = {key: manifest.get(key) for key in of_bytes} == of_bytes
    return manifest if same and not find_damaged_splits(folder, manifest) else {}


def check_replaceable(folder: Path) -> None:
    """Check that `folder` is free or holds an earlier dataset and nothing else.

    Raises BadInput: it holds other files, which publishing would remove.
    """
    if not folder.exists():
        return
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    foreign = sorted(present - FILES)
    if foreign or (present and "dataset.json" not in present):
        raise BadInput(
            f"{folder} holds {', '.join((foreign or sorted(present))[:5])}, not written by `prepare`",
            "a name that is free, or an earlier dataset's",
            "choose another with --name, or move that folder away",
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read dataset.json; empty if it is missing or unreadable (the dataset is then made again)."""
    return read_json_object(folder / "dataset.json")


def find_damaged_splits(folder: Path, manifest: dict[str, Any], splits: Sequence[str] = SPLITS) -> list[str]:
    """Return the .bin files that do not match the manifest's checksums, or whose masks do not."""
    damaged = []
    for split in splits:
        try:
            about = manifest["splits"][split]
            whole = downloads.sha256_of(folder / f"{split}.bin") == about["sha256"]
            if whole and "mask_sha256" in about:
                whole = downloads.sha256_of(folder / f"{split}.mask") == about["mask_sha256"]
        except (OSError, KeyError, TypeError):
            whole = False
        if not whole:
            damaged.append(f"{split}.bin")
    return damaged


def check_content(folder: Path, manifest: dict[str, Any], splits: Sequence[str] = SPLITS) -> None:
    """Compare a dataset's files with its manifest; nanoGPT's folders have no manifest.

    Raises Damaged: they are not what was written.
    """
    if manifest and (damaged := find_damaged_splits(folder, manifest, splits)):
        raise Damaged(
            f"{folder}/{damaged[0]} does not hash to what dataset.json says",
            str(manifest["splits"][damaged[0].removesuffix(".bin")].get("sha256")),
            f"prepare it again, or remove {folder}",
        )
    for split in splits if "loss_on" in manifest else ():
        if not has_loss_target(folder / f"{split}.mask"):
            raise Damaged(
                f"{folder}/{split}.mask: no token counts", "some that do", f"prepare it again: rm -r {folder}"
            )


def has_loss_target(mask: Path) -> bool:
    """Return True if a mask has a byte that is not zero."""
    with open(mask, "rb") as file:
        return any(block.strip(b"\0") for block in iter(lambda: file.read(1 << 20), b""))


def describe_splits(folder: Path, encoder: Tokenizer, figures: dict[str, int]) -> dict[str, Any]:
    """Describe the finished .bin files for the manifest; `figures` has "SPLIT documents", "SPLIT characters" and more.

    Raises BadInput: too little text.
    """
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        path = folder / f"{split}.bin"
        splits[split] = {
            "tokens": path.stat().st_size // ID_BYTES,
            "documents": figures.get(f"{split} documents", 0),
            "characters": figures.get(f"{split} characters", 0),
            "sha256": downloads.sha256_of(path),
        }
    if min(part["tokens"] for part in splits.values()) <= MIN_SPLIT_TOKENS:
        raise BadInput(
            f"too little text: {splits['train']['tokens']:,} tokens to train, {splits['val']['tokens']:,} to validate",
            f"more than {MIN_SPLIT_TOKENS} tokens of each, the smallest useful window",
            "give more text, or another --val-fraction",
        )
    return {
        "tokenizer": {
            "kind": encoder.kind,
            "vocab_size": encoder.vocab_size,
            "digest": vocabulary_digest(encoder.vocabulary()),
        },
        "splits": splits,
        "longest_document": figures.get("longest", 0),
        "duplicates_left_out": figures.get("duplicates", 0),
        "empty_left_out": figures.get("empty", 0),
        "written_by": f"gpt2box {gpt2box.__version__}",
    }


def replace_folder(temporary: Path, folder: Path, retired: Path) -> None:
    """Rename a finished folder into place; an older dataset of that name is removed."""
    for path in [*temporary.rglob("*"), temporary]:
        fsync_dir(path)
    if folder.exists():
        os.rename(folder, retired)
    os.rename(temporary, folder)
    fsync_dir(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)
