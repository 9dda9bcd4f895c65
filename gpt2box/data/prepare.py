"""Text to a dataset folder: split, tokenise, write beside, publish by one rename."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gpt2box
from gpt2box.data import assets, tokenizer
from gpt2box.data.corpora import Corpus
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.data.tokens import FORMAT, ID_BYTES, SPLITS
from gpt2box.errors import BadInput, VolumeUnwritable
from gpt2box.paths import fix_hint, fsync_dir, locked, make_writable, raw_dir, read_object
from gpt2box.progress import bytes_bar

SPLIT_SEED = 2357  # nanoGPT's, for OpenWebText
SMALLEST_WINDOW = 64  # tokens of a split without which no loss means anything
WHOLE_DOCUMENTS = 10  # from this many on, whole documents are held out


@dataclass(frozen=True)
class Request:
    """What is asked of `prepare` besides the text."""

    tokenizer: str  # gpt2 or char
    val_fraction: float


def prepare(corpus: Corpus, request: Request, folder: Path) -> tuple[dict[str, Any], bool]:
    """Make the dataset in `folder` unless it is there from the same text and settings.

    Returns: the manifest, and whether anything was written.

    Raises:
        BadInput: too little text.
        VolumeUnwritable: no space or no permission.
    """
    wanted = identity(corpus, request)
    if (
        (present := read_manifest(folder))
        and {key: present.get(key) for key in wanted} == wanted
        and complete(folder, present)
    ):
        return present, False
    make_writable(folder.parent)
    with locked(folder.parent / f".{folder.name}.lock", f"the dataset {folder.name} is being made"):
        return make(corpus, request, folder, wanted), True


def make(corpus: Corpus, request: Request, folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Write the dataset beside and publish it; returns its manifest."""
    retired, temporary = (folder.parent / f".{folder.name}.{suffix}" for suffix in ("old", "tmp"))
    if retired.exists() and not folder.exists():  # killed between publish's two renames
        os.rename(retired, folder)
    check_replaceable(folder)
    shutil.rmtree(retired, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        manifest = wanted | write(corpus, request, temporary)
        (temporary / "dataset.json").write_text(
            json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        publish(temporary, folder, retired)
    except OSError as error:
        raise VolumeUnwritable(f"cannot write {folder}: {error.strerror}", "free space", fix_hint(folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def check_replaceable(folder: Path) -> None:
    """Whether what bears the dataset's name is an earlier dataset and nothing else.

    Raises:
        BadInput: it holds other files, which publishing would remove.
    """
    if not folder.exists():
        return
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    foreign = sorted(present - {*(f"{split}.bin" for split in SPLITS), "dataset.json", "tokenizer"})
    if foreign or (present and "dataset.json" not in present):
        raise BadInput(
            f"{folder} holds {', '.join((foreign or sorted(present))[:5])}, not written by `prepare`",
            "a name that is free, or an earlier dataset's",
            "choose another with --name, or move that folder away",
        )


def identity(corpus: Corpus, request: Request) -> dict[str, Any]:
    """What the dataset follows from: the same identity gives the same bytes."""
    return {
        "format": FORMAT,
        "source": corpus.source,
        "documents": corpus.fingerprint(),
        "split": {"val_fraction": request.val_fraction, "seed": SPLIT_SEED},
        "end_of_text": corpus.end_of_text,
        "requested_tokenizer": request.tokenizer,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """dataset.json, or nothing where it is missing or unreadable (the dataset is then made anew)."""
    return read_object(folder / "dataset.json")


def complete(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether the .bin files still hash to what the manifest says."""
    try:
        return all(assets.sha256_of(folder / f"{s}.bin") == manifest["splits"][s]["sha256"] for s in SPLITS)
    except (OSError, KeyError, TypeError):
        return False


def split(corpus: Corpus, val_fraction: float) -> dict[str, list[str]]:
    """The texts of each split.

    Of ten documents or more, whole ones are held out: in a seeded order each that still fits into the
    wanted share of characters, so that validation is on texts never seen. Where that comes to less
    than 80% of the share (few documents, or one that is most of the text), and with fewer documents,
    the end of each is held out instead, as nanoGPT does with its one.
    """
    texts = [document.text for document in corpus.documents]
    wanted = sum(map(len, texts)) * val_fraction
    order = list(range(len(texts)))
    random.Random(SPLIT_SEED).shuffle(order)
    chosen: set[int] = set()
    characters = 0
    for index in order:
        if characters + len(texts[index]) <= wanted:
            chosen.add(index)
            characters += len(texts[index])
    if len(texts) >= WHOLE_DOCUMENTS and characters >= 0.8 * wanted:
        return {
            "train": [text for i, text in enumerate(texts) if i not in chosen],
            "val": [text for i, text in enumerate(texts) if i in chosen],
        }
    cuts = [(text, int(len(text) * (1 - val_fraction))) for text in texts]
    return {"train": [text[:cut] for text, cut in cuts], "val": [text[cut:] for text, cut in cuts]}


def write(corpus: Corpus, request: Request, folder: Path) -> dict[str, Any]:
    """Write both .bin files and the tokenizer into `folder`; returns the manifest's share."""
    encoder = make_tokenizer(corpus, request)
    (folder / "tokenizer").mkdir()
    encoder.save(folder / "tokenizer")
    parts = split(corpus, request.val_fraction)
    counts: dict[str, dict[str, Any]] = {}
    total = sum(len(text) for texts in parts.values() for text in texts)
    with bytes_bar("tokenising", total) as advance:
        for name, texts in parts.items():
            path = folder / f"{name}.bin"
            with open(path, "wb") as file:
                for text in texts:
                    file.write(encoder.encode(text).astype("<u2").tobytes())
                    advance(len(text))
                    if corpus.end_of_text and encoder.end_of_text is not None:
                        file.write(np.array([encoder.end_of_text], dtype="<u2").tobytes())
                file.flush()
                os.fsync(file.fileno())
            tokens = path.stat().st_size // ID_BYTES
            characters = sum(map(len, texts))
            digest = assets.sha256_of(path)
            counts[name] = {"tokens": tokens, "documents": len(texts), "characters": characters, "sha256": digest}
    if min(part["tokens"] for part in counts.values()) <= SMALLEST_WINDOW:
        raise BadInput(
            f"too little text: {counts['train']['tokens']:,} tokens to train, {counts['val']['tokens']:,} to validate",
            f"more than {SMALLEST_WINDOW} tokens of each, the smallest useful window",
            "give more text, or another --val-fraction",
        )
    return {
        "tokenizer": {"kind": encoder.kind, "vocab_size": encoder.vocab_size},
        "splits": counts,
        "written_by": f"gpt2box {gpt2box.__version__}",
    }


def make_tokenizer(corpus: Corpus, request: Request) -> Tokenizer:
    """GPT-2's BPE, or the characters of the whole corpus."""
    if request.tokenizer == "char":
        return tokenizer.from_texts((d.text for d in corpus.documents), corpus.end_of_text)
    return tokenizer.from_ranks(assets.fetch(assets.GPT2_RANKS, raw_dir()))


def publish(temporary: Path, folder: Path, retired: Path) -> None:
    """Give a finished folder its name; an older dataset of that name makes way."""
    for path in [*temporary.rglob("*"), temporary]:
        if path.is_dir():
            fsync_dir(path)
    if folder.exists():
        os.rename(folder, retired)
    os.rename(temporary, folder)
    fsync_dir(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)
