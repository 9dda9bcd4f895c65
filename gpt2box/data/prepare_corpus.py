"""A collection of documents to a dataset, so that a kill costs little."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt2box.data.bin_writer import ShuffledSink, Sink
from gpt2box.data.bulk_tokenizer import source_of
from gpt2box.data.corpus import Collection, check_counted, rows_in
from gpt2box.data.dataset import FORMAT
from gpt2box.data.dataset_folder import SPLIT_SEED, Made, described, make
from gpt2box.data.tokenize_workers import run, usual_workers
from gpt2box.data.tokenizer import identity_of
from gpt2box.errors import VolumeUnwritable
from gpt2box.system import host
from gpt2box.utils.files import read_object, write_atomically
from gpt2box.utils.progress import say, size

FILES_AT_ONCE = 4  # of those that are brought: the one at work, those ahead, one being written


@dataclass(frozen=True)
class Choices:
    """What is asked besides the files. `workers` alone does not change the bytes."""

    val_fraction: float
    split: str = "content"  # or nanogpt
    column: str = ""
    max_documents: int | None = None
    keep_duplicates: bool = False
    workers: int = 0
    tokenizer: str = "gpt2"  # or the folder of another


def prepare_many(collection: Collection, choices: Choices, folder: Path) -> Made:
    """Make the dataset in `folder` unless it is there from the same files and choices; goes on where it was ended.

    Returns: the manifest, and whether anything was written.

    Raises:
        BadInput: too little text, or files that are not as they should be.
        VolumeUnwritable: no space or no permission.
    """
    if choices.split == "nanogpt" and not collection.documents:
        check_counted(collection.sources)
    asked = {key: value for key, value in asdict(choices).items() if key not in ("workers", "tokenizer")}
    if choices.tokenizer != "gpt2":
        asked["tokenizer"] = identity_of(choices.tokenizer)
    identity = {"format": FORMAT, "source": collection.source, "documents": collection.identity, "choices": asked}

    def write_beside(temporary: Path) -> dict[str, Any]:
        check_space(collection, choices, temporary)
        return write(collection, choices, temporary)

    return make(folder, identity, write_beside, resumable=True)


def check_space(collection: Collection, choices: Choices, temporary: Path) -> None:
    """Say what will be written, and refuse where that is more than is free.

    Raises:
        VolumeUnwritable: with the bytes missing.
    """
    if choices.max_documents is not None:
        return
    largest = max((source.size_bytes for source in collection.sources), default=0)
    ahead = largest * FILES_AT_ONCE if collection.brought else 0
    if collection.brought and choices.split == "nanogpt" and not collection.documents:
        ahead = collection.size_bytes()  # all are brought before the first is tokenised: to be counted
    there = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    needed, free = max(collection.token_bytes() - there, 0) + ahead, host.free_bytes(temporary)
    say(f"{len(collection.sources)} files, {size(collection.size_bytes())}: takes about {size(needed)} of disk")
    if needed > free:
        raise VolumeUnwritable(
            f"{size(free)} free in {temporary.parent}; that is {size(needed - free)} too few",
            "more space",
            "free space, set GPT2BOX_VOLUMES to a folder on a larger disk, or take a part: --max-docs 100000",
        )


def write(collection: Collection, choices: Choices, folder: Path) -> dict[str, Any]:
    """Write both .bin files and the tokenizer into `folder`; returns the manifest's share."""
    source, encoder = source_of(choices.tokenizer)
    assert encoder.end_of_text is not None
    (folder / "tokenizer").mkdir(exist_ok=True)
    aside = ThreadPoolExecutor(1)
    saving = aside.submit(encoder.save, folder / "tokenizer")  # a second's work
    sink: Sink
    if choices.split == "nanogpt":
        counted = folder / "documents.json"  # counting brings every file, and those tokenised are gone on going on
        documents = collection.documents or read_object(counted).get("rows") or rows_in(collection.sources)
        write_atomically(counted, json.dumps({"rows": documents}))
        documents = min(documents, choices.max_documents or documents)
        sink = ShuffledSink(folder, documents, choices.val_fraction, SPLIT_SEED)
    else:
        sink = Sink(folder, choices.val_fraction, SPLIT_SEED, not choices.keep_duplicates, collection.tail)
    workers = choices.workers or usual_workers()
    run(collection.sources, sink, choices.column, source, encoder.end_of_text, workers, choices.max_documents)
    saving.result()
    return described(folder, encoder, sink.finish())
