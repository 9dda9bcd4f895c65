"""Prepare a dataset from texts in memory: split, tokenize, write."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.data import downloads, tokenizer
from gpt2box.data.dataset import FORMAT
from gpt2box.data.dataset_folder import (
    MIN_DOCUMENTS_TO_HOLD_OUT,
    SPLIT_SEED,
    PreparedDataset,
    describe_splits,
    publish_dataset,
)
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.sources import TextCorpus
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.utils.paths import raw_dir
from gpt2box.utils.progress import byte_progress


def prepare_texts(corpus: TextCorpus, config: PrepareConfig, folder: Path) -> PreparedDataset:
    """Make the dataset in `folder` unless it exists with the same text and choices.

    Returns the manifest, and True if anything was written.

    Raises:
        BadInput: too little text.
        VolumeUnwritable: no space or no permission.
    """
    return publish_dataset(
        folder, texts_identity(corpus, config), lambda beside: write_texts(corpus, config, beside), resumable=False
    )


def texts_identity(corpus: TextCorpus, config: PrepareConfig) -> dict[str, Any]:
    """Return what determines the dataset: the same identity gives the same bytes."""
    return {
        "format": FORMAT,
        "source": corpus.source,
        "documents": corpus.files,
        "split": {"val_fraction": config.val_fraction, "seed": SPLIT_SEED},
        "end_of_text": corpus.end_of_text,
        "requested_tokenizer": tokenizer.tokenizer_identity(config.tokenizer),
        "duplicates_left_out": corpus.duplicates,
    }


def split_texts(texts: list[str], val_fraction: float) -> dict[str, list[str]]:
    """Split texts into train and val.

    With ten documents or more, complete documents are held out: in a seeded order, each that still fits into
    the wanted share of characters. With fewer documents, or if that reaches less than 80% of the share, the
    end of each document is held out, as nanoGPT does with its single one.
    """
    wanted = sum(map(len, texts)) * val_fraction
    order = list(range(len(texts)))
    random.Random(SPLIT_SEED).shuffle(order)
    chosen: set[int] = set()
    characters = 0
    for index in order:
        if characters + len(texts[index]) <= wanted:
            chosen.add(index)
            characters += len(texts[index])
    if len(texts) >= MIN_DOCUMENTS_TO_HOLD_OUT and characters >= 0.8 * wanted:
        return {
            "train": [text for i, text in enumerate(texts) if i not in chosen],
            "val": [text for i, text in enumerate(texts) if i in chosen],
        }
    cuts = [(text, int(len(text) * (1 - val_fraction))) for text in texts]
    return {"train": [text[:cut] for text, cut in cuts], "val": [text[cut:] for text, cut in cuts]}


def write_texts(corpus: TextCorpus, config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Write both .bin files and the tokenizer into `folder`; return their part of the manifest."""
    encoder = make_tokenizer(corpus, config)
    (folder / "tokenizer").mkdir()
    encoder.save(folder / "tokenizer")
    assert config.val_fraction is not None
    splits = split_texts(corpus.texts, config.val_fraction)
    figures = {"longest": 0, "duplicates": corpus.duplicates, "empty": corpus.empty}
    with byte_progress("tokenising", sum(map(len, corpus.texts))) as advance:
        for name, texts in splits.items():
            figures |= {f"{name} documents": len(texts), f"{name} characters": sum(map(len, texts))}
            with open(folder / f"{name}.bin", "wb") as file:
                for text in texts:
                    ids = encoder.encode(text)
                    if corpus.end_of_text and encoder.end_of_text is not None:
                        ids = np.append(ids, np.uint16(encoder.end_of_text))
                    file.write(ids.astype("<u2").tobytes())
                    figures["longest"] = max(figures["longest"], len(ids))
                    advance(len(text))
                file.flush()
                os.fsync(file.fileno())
    return describe_splits(folder, encoder, figures)


def make_tokenizer(corpus: TextCorpus, config: PrepareConfig) -> Tokenizer:
    """Return GPT-2's BPE, a character tokenizer built from the corpus, or a folder's tokenizer."""
    if config.tokenizer == "char":
        return tokenizer.build_char_tokenizer(corpus.texts, corpus.end_of_text)
    if config.tokenizer != "gpt2":
        return tokenizer.load_tokenizer(Path(config.tokenizer))
    return tokenizer.load_gpt2_tokenizer(downloads.fetch(downloads.GPT2_RANKS, raw_dir()))
