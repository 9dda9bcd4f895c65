"""Prepare a dataset from a corpus file by file; interrupted work resumes."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpt2box.data.bin_writer import BinWriter, ShuffledBinWriter
from gpt2box.data.bulk_tokenizer import resolve_source
from gpt2box.data.corpus import FileCorpus, check_row_counts, count_rows
from gpt2box.data.dataset import FORMAT
from gpt2box.data.dataset_folder import SPLIT_SEED, PreparedDataset, describe_splits, publish_dataset
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.tokenize_workers import default_worker_count, tokenize_files
from gpt2box.data.tokenizer import tokenizer_identity
from gpt2box.errors import VolumeUnwritable
from gpt2box.system import host
from gpt2box.utils.files import read_json_object, write_atomically
from gpt2box.utils.progress import format_bytes, log_line

FILES_AT_ONCE = 4  # downloaded: one being tokenized, those ahead, one being written


def prepare_corpus(collection: FileCorpus, config: PrepareConfig, folder: Path) -> PreparedDataset:
    """Make the dataset in `folder` unless it exists with the same files and choices; resume interrupted work.

    Returns the manifest, and True if anything was written.

    Raises:
        BadInput: too little text, or files that are not as they should be.
        VolumeUnwritable: no space or no permission.
    """
    if config.split == "nanogpt" and not collection.documents:
        check_row_counts(collection.sources)
    asked = {
        "val_fraction": config.val_fraction,
        "split": config.split,
        "column": config.text_column,
        "max_documents": config.max_docs,
        "keep_duplicates": config.keep_duplicates,
    }
    if config.tokenizer != "gpt2":
        asked["tokenizer"] = tokenizer_identity(config.tokenizer)
    identity = {"format": FORMAT, "source": collection.source, "documents": collection.identity, "choices": asked}

    def write_beside(temporary: Path) -> dict[str, Any]:
        check_space(collection, config, temporary)
        return write(collection, config, temporary)

    return publish_dataset(folder, identity, write_beside, resumable=True)


def check_space(collection: FileCorpus, config: PrepareConfig, temporary: Path) -> None:
    """Log the space needed and check that it is free. Raises VolumeUnwritable: with the bytes missing."""
    if config.max_docs is not None:
        return
    largest = max((source.size_bytes for source in collection.sources), default=0)
    ahead = largest * FILES_AT_ONCE if collection.is_download else 0
    if collection.is_download and config.split == "nanogpt" and not collection.documents:
        ahead = collection.size_bytes()  # all are downloaded first, to count their rows
    there = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    needed, free = max(collection.token_bytes() - there, 0) + ahead, host.free_bytes(temporary)
    log_line(
        f"{len(collection.sources)} files, {format_bytes(collection.size_bytes())}: takes about "
        f"{format_bytes(needed)} of disk"
    )
    if needed > free:
        raise VolumeUnwritable(
            f"{format_bytes(free)} free in {temporary.parent}; that is {format_bytes(needed - free)} too few",
            "more space",
            "free space, set GPT2BOX_VOLUMES to a folder on a larger disk, or take a part: --max-docs 100000",
        )


def write(collection: FileCorpus, config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Write both .bin files and the tokenizer into `folder`; return their part of the manifest."""
    source, encoder = resolve_source(config.tokenizer)
    assert encoder.end_of_text is not None
    (folder / "tokenizer").mkdir(exist_ok=True)
    aside = ThreadPoolExecutor(1)
    saving = aside.submit(encoder.save, folder / "tokenizer")  # a second's work
    assert config.val_fraction is not None
    writer: BinWriter
    if config.split == "nanogpt":
        counted = folder / "documents.json"  # counting downloads every file; after a resume the tokenized ones are gone
        documents = collection.documents or read_json_object(counted).get("rows") or count_rows(collection.sources)
        write_atomically(counted, json.dumps({"rows": documents}))
        documents = min(documents, config.max_docs or documents)
        writer = ShuffledBinWriter(folder, documents, config.val_fraction, SPLIT_SEED)
    else:
        writer = BinWriter(
            folder, config.val_fraction, SPLIT_SEED, not config.keep_duplicates, collection.hold_out_tails
        )
    workers = config.workers or default_worker_count()
    tokenize_files(
        collection.sources, writer, config.text_column, source, encoder.end_of_text, workers, config.max_docs
    )
    saving.result()
    return describe_splits(folder, encoder, writer.finish())
