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
from gpt2box.paths import fix_hint, fsync_dir, make_writable, raw_dir
from gpt2box.progress import bytes_bar

SPLIT_SEED = 2357  # nanoGPT's, for OpenWebText
SMALLEST_WINDOW = 64  # tokens of validation without which no loss means anything


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
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        manifest = wanted | write(corpus, request, temporary)
        (temporary / "dataset.json").write_text(
            json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        publish(temporary, folder)
    except OSError as error:
        raise VolumeUnwritable(f"cannot write {folder}: {error.strerror}", "free space", fix_hint(folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest, True


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
    try:
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def complete(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether the .bin files still hash to what the manifest says."""
    try:
        return all(assets.sha256_of(folder / f"{s}.bin") == manifest["splits"][s]["sha256"] for s in SPLITS)
    except (OSError, KeyError, TypeError):
        return False


def split(corpus: Corpus, val_fraction: float) -> dict[str, list[str]]:
    """The texts of each split.

    Where there are enough documents, whole ones are held out (a seeded choice), so that validation
    is on texts never seen; otherwise the end of each document is, as nanoGPT does with its one.
    """
    texts = [document.text for document in corpus.documents]
    held_out = round(len(texts) * val_fraction)
    if held_out:
        order = list(range(len(texts)))
        random.Random(SPLIT_SEED).shuffle(order)
        chosen = set(order[:held_out])
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
    if counts["val"]["tokens"] <= SMALLEST_WINDOW:
        raise BadInput(
            f"too little text: {counts['train']['tokens']:,} tokens to train, {counts['val']['tokens']:,} to validate",
            f"more than {SMALLEST_WINDOW} tokens to validate, the smallest useful window",
            "give more text, or a larger --val-fraction",
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


def publish(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name; an older dataset of that name makes way."""
    for path in [*temporary.rglob("*"), temporary]:
        if path.is_dir():
            fsync_dir(path)
    retired = folder.parent / f".{folder.name}.{os.getpid()}.old"
    if folder.exists():
        os.rename(folder, retired)
    os.rename(temporary, folder)
    fsync_dir(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)
