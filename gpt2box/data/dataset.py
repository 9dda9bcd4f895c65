"""Open a prepared dataset: train.bin and val.bin (raw little-endian uint16 ids, nanoGPT's format),
dataset.json and the tokenizer's files."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2box.data import downloads, tokenizer
from gpt2box.data.sources import CORPORA, OPENWEBTEXT
from gpt2box.data.tokenizer import Tokenizer, Tokens
from gpt2box.errors import BadInput, Damaged, describe_error
from gpt2box.utils.files import open_regular, read_json
from gpt2box.utils.paths import raw_dir

FORMAT = 1
SPLITS = ("train", "val")
ID_BYTES = 2


@dataclass(frozen=True)
class Dataset:
    """Describe an opened dataset folder."""

    folder: Path
    manifest: dict[str, Any]  # empty for a folder that nanoGPT wrote

    def tokens(self, split: str) -> int:
        """Return the number of tokens in a split."""
        return (self.folder / f"{split}.bin").stat().st_size // ID_BYTES

    @property
    def masked(self) -> bool:
        """Return True if only some tokens are targets, given by a .mask file beside each .bin."""
        return "loss_on" in self.manifest

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Load the dataset's tokenizer; GPT-2's for a folder that nanoGPT wrote."""
        if self.manifest:
            return tokenizer.load_tokenizer(self.folder / "tokenizer")
        return tokenizer.load_gpt2_tokenizer(downloads.fetch(downloads.GPT2_RANKS, raw_dir()))

    @cached_property
    def digest(self) -> str:
        """Return a short checksum of val.bin, to recognise a changed dataset."""
        if self.manifest:
            return str(self.manifest["splits"]["val"]["sha256"][:12])
        return downloads.sha256_of(self.folder / "val.bin")[:12]


class TokenFile:
    """Read a .bin file, and the .mask file beside it if the manifest has one, at any position. Thread-safe.

    Read with pread and not through a memory map: a map's pages count as the process's memory as it
    walks through the file (nanoGPT's issue 287); the page cache serves both alike.

    Raises Damaged: see load_manifest; or there is no mask where there should be one.
    """

    def __init__(self, path: Path) -> None:
        masked = "loss_on" in load_manifest(path.parent)
        self._path, self._mask = path, None
        self._descriptor = os.open(path, os.O_RDONLY)
        self.tokens = os.fstat(self._descriptor).st_size // ID_BYTES
        if masked:
            try:
                self._mask = open_regular(path.with_suffix(".mask"), os.O_RDONLY)
            except OSError as error:
                self.close()
                raise Damaged(
                    f"{path.with_suffix('.mask')}: {describe_error(error)}", "a byte a token", "prepare it again"
                ) from error

    def read(self, start: int, count: int) -> Tokens:
        """Read `count` ids from position `start`."""
        content = os.pread(self._descriptor, count * ID_BYTES, start * ID_BYTES)
        if len(content) != count * ID_BYTES:
            raise Damaged(f"{self._path} ends at token {self.tokens:,}", f"{start + count:,} tokens or more")
        return np.frombuffer(content, dtype="<u2")

    def counted(self, start: int, count: int) -> npt.NDArray[np.bool_] | None:
        """Return which of those tokens are targets, or None if all are."""
        if self._mask is None:
            return None
        content = os.pread(self._mask, count, start)
        if len(content) != count:
            raise Damaged(f"{self._path.with_suffix('.mask')} ends too early", f"{start + count:,} bytes or more")
        marks = np.frombuffer(content, dtype=np.uint8)
        if (largest := int(marks.max(initial=0))) > 1:
            raise Damaged(f"{self._path.with_suffix('.mask')} has a byte {largest}", "0 or 1", "prepare it again")
        return marks.view(np.bool_)

    def close(self) -> None:
        os.close(self._descriptor)
        if self._mask is not None:
            os.close(self._mask)


def load_manifest(folder: Path) -> dict[str, Any]:
    """Load dataset.json; empty for a folder that nanoGPT wrote, which has none.

    Raises Damaged: it is unreadable, or gone from a folder that `prepare` wrote.
    """
    path = folder / "dataset.json"
    if not os.path.lexists(path) and not (folder / "tokenizer").exists():
        return {}
    try:
        manifest = read_json(path)
        if not isinstance(manifest, dict) or not manifest:
            raise ValueError("no object, or an empty one")
    except FileNotFoundError as error:
        raise Damaged(
            f"{path} is gone, which says in which tokens {folder} is",
            "a manifest as `prepare` writes it",
            f"rm -r {folder}, and prepare it again",
        ) from error
    except (OSError, ValueError) as error:
        raise manifest_error(path, error) from error
    return manifest


def manifest_error(path: Path, error: Exception) -> Damaged:
    """Return the error for an invalid dataset.json."""
    return Damaged(
        f"{path} is damaged ({describe_error(error)})", "a manifest as `prepare` writes it", "prepare it again"
    )


def check_nanogpt(folder: Path) -> None:
    """Check that a folder without a manifest can be nanoGPT's: GPT-2's ids, two bytes each.

    Raises:
        BadInput: its vocabulary is another.
        Damaged: half an id.
    """
    if (folder / "meta.pkl").exists():
        raise BadInput(
            f"{folder} has its vocabulary in meta.pkl, a pickle, which can run any code and is not read",
            "a folder written by `gpt2box prepare`",
            "gpt2box prepare INPUT.txt --tokenizer char, with the text it was made from",
        )
    for split in SPLITS:
        if (found := (folder / f"{split}.bin").stat().st_size) % ID_BYTES:
            raise Damaged(
                f"{folder}/{split}.bin has {found:,} bytes", "an even number: two for each token", "write it again"
            )


def prepare_hint(folder: Path) -> str:
    """Return the command that makes the dataset."""
    corpus = folder.name.removesuffix("-char")
    if corpus in CORPORA or folder.name in OPENWEBTEXT:
        return f"gpt2box prepare {corpus}" + (" --tokenizer char" if folder.name != corpus else "")
    return f"gpt2box prepare YOUR_TEXT --name {folder.name}, or put nanoGPT's train.bin and val.bin there"


def open_dataset(folder: Path) -> Dataset:
    """Open the dataset in `folder` and check its sizes and vocabulary.

    Raises:
        BadInput: no dataset there, or nanoGPT's with a pickled vocabulary.
        Damaged: it is not what its manifest says.
    """
    missing = [f"{split}.bin" for split in SPLITS if not (folder / f"{split}.bin").is_file()]
    if missing:
        raise BadInput(
            f"no dataset in {folder}: {' and '.join(missing)} missing",
            "a folder written by `gpt2box prepare`",
            prepare_hint(folder),
        )
    path, manifest = folder / "dataset.json", load_manifest(folder)
    if not manifest:
        check_nanogpt(folder)
        return Dataset(folder, {})
    try:
        expected = {split: manifest["splits"][split]["tokens"] for split in SPLITS}
        vocab_size = manifest["tokenizer"]["vocab_size"]
        version = manifest["format"]
        str(manifest["splits"]["val"]["sha256"][:12])
        if "loss_on" in manifest and manifest["splits"]["train"].get("counted_tokens") == 0:
            raise ValueError("no token counts")
        if any(("mask_sha256" in manifest["splits"][split]) != ("loss_on" in manifest) for split in SPLITS):
            raise ValueError("loss_on without mask_sha256, or the other way round")
        if not all(type(count) is int and count >= 0 for count in (*expected.values(), vocab_size)):
            raise ValueError(f"tokens {expected}, vocab_size {vocab_size!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise manifest_error(path, error) from error
    if version != FORMAT:
        raise BadInput(f"{path} has format {version}", f"format {FORMAT}", "prepare it again with this version")
    dataset = Dataset(folder, manifest)
    for split, tokens in expected.items():
        found = (folder / f"{split}.bin").stat().st_size
        if found != tokens * ID_BYTES:
            raise Damaged(
                f"{folder}/{split}.bin has {found:,} bytes",
                f"{tokens * ID_BYTES:,} bytes",
                f"remove {folder}, prepare again",
            )
        mask = folder / f"{split}.mask"
        if dataset.masked and (not mask.is_file() or mask.stat().st_size != tokens):
            raise Damaged(f"{mask} is missing or not of {tokens:,} bytes", "a byte a token", "prepare it again")
    if dataset.tokenizer.vocab_size != vocab_size:
        raise Damaged(
            f"{folder}/tokenizer has {dataset.tokenizer.vocab_size} tokens",
            f"{vocab_size}",
            f"remove {folder}, prepare again",
        )
    return dataset
