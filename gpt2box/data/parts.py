"""The work of several machines: each tokenises some of the files, one puts the parts together.

A part is what the workers make of its files, as it is. Putting it together takes the same documents in the same order
as one machine would, so the bytes are the same.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.data import downloads
from gpt2box.data.bin_writer import Chunk, Sink, first
from gpt2box.data.corpus import Collection
from gpt2box.data.tokenize_workers import SAVE_EVERY, run
from gpt2box.data.tokenizer import from_ranks
from gpt2box.errors import BadInput, Damaged
from gpt2box.utils.files import locked, read_object, write_atomically
from gpt2box.utils.paths import make_writable, raw_dir
from gpt2box.utils.progress import bytes_bar, say

RECORD = "part.json"  # written when a part is whole


class PartSink(Sink):
    """Keeps each unit's documents in a file of their own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, val_fraction=0, seed=0, drop_duplicates=False)

    def names(self) -> list[str]:
        return []

    def take(self, chunk: Chunk) -> None:
        number = self.state["counts"].get("chunks", 0)
        with open(self.folder / f"chunk-{number:06d}.npz", "wb") as file:
            tokens = chunk.tokens if isinstance(chunk.tokens, np.ndarray) else np.fromfile(chunk.tokens, "<u2")
            digests = np.frombuffer(chunk.digests, np.uint8)
            lengths, characters = chunk.lengths, chunk.characters
            np.savez(file, tokens=tokens, lengths=lengths, digests=digests, characters=characters, empty=chunk.empty)
            file.flush()
            os.fsync(file.fileno())
        self.count("chunks", 1)
        self.count("documents", len(chunk.lengths))


def make_part(collection: Collection, files: tuple[int, int], name: str, column: str, workers: int) -> Path:
    """Tokenise some files of a collection; goes on where it was ended. Returns the part's folder."""
    folder = raw_dir() / "parts" / f"{name}-{files[0]:05d}-{files[1]:05d}"
    make_writable(folder)
    with locked(folder.parent / f".{folder.name}.lock", f"the part {folder.name} is being made"):
        record = part_of(collection, files, column)
        stored = read_object(folder / RECORD)
        if {key: stored.get(key) for key in record} == json.loads(json.dumps(record)):
            say("nothing to do: this part is there already")
            return folder
        if read_object(folder / "begun.json") != json.loads(json.dumps(record)):
            for path in folder.iterdir():
                path.unlink()
            write_atomically(folder / "begun.json", json.dumps(record))
        ranks = downloads.fetch(downloads.GPT2_RANKS, raw_dir())
        end_of_text = from_ranks(ranks).end_of_text
        assert end_of_text is not None
        sink = PartSink(folder)
        run(collection.sources, sink, column, ranks, end_of_text, workers, None)
        write_atomically(folder / RECORD, json.dumps(record | {"counts": sink.finish()}, indent=1))
    return folder


def part_of(collection: Collection, files: tuple[int, int], column: str) -> dict[str, Any]:
    """What a part's content follows from."""
    about = {key: value for key, value in vars(collection).items() if key in ("source", "identity", "of", "tail")}
    return {"files": list(files), "column": column, "collection": about}


def found_parts(name: str) -> tuple[Collection, list[Path], str]:
    """All parts of a corpus, in order: as one collection, their folders, and the column.

    Raises:
        BadInput: one is missing, unfinished, or of something else.
    """
    folders = sorted((raw_dir() / "parts").glob(f"{name}-?????-?????"))
    records = [read_object(folder / RECORD) for folder in folders]
    again = f"gpt2box prepare {name} --shard-range A:B, on any machine, with what is missing"
    if not folders:
        raise BadInput(f"no part of {name} in {raw_dir() / 'parts'}", "parts that --shard-range wrote", again)
    if unfinished := [folder.name for folder, record in zip(folders, records, strict=True) if not record]:
        raise BadInput(f"the part {unfinished[0]} is not finished", "whole parts", again)
    first_part = records[0]
    end = 0
    for folder, record in zip(folders, records, strict=True):
        if record["files"][0] < end:
            raise BadInput(
                f"{folder.name} overlaps the part before it",
                f"a part that begins with file {end}",
                f"remove {folder}, or the other",
            )
        if record["files"][0] > end:
            raise BadInput(f"files {end} to {record['files'][0] - 1} are missing", "parts of all files", again)
        for key in ("source", "of"):
            if record["collection"][key] != first_part["collection"][key] or record["column"] != first_part["column"]:
                raise BadInput(f"{folder.name} is of another corpus than {folders[0].name}", "parts of one corpus")
        end = record["files"][1]
    of = first_part["collection"]["of"]
    if end < of:
        raise BadInput(f"files {end} to {of - 1} are missing", "parts of all files", again)
    identity = [file for record in records for file in record["collection"]["identity"]]
    documents = sum(record["counts"]["documents"] for record in records)
    whole = Collection(
        first_part["collection"]["source"], identity, [], of, documents, first_part["collection"]["tail"]
    )
    return whole, folders, str(first_part["column"])


def merge(folders: Sequence[Path], sink: Sink, most: int | None) -> None:
    """Take the documents of all parts, in order, up to `most`; goes on where it was ended.

    Raises:
        Damaged: a part is not whole.
    """
    paths = [path for folder in folders for path in sorted(folder.glob("chunk-*.npz"))]
    expected = sum(int(read_object(folder / RECORD)["counts"]["chunks"]) for folder in folders)
    if len(paths) != expected:
        raise Damaged(f"{len(paths)} files in the parts", f"{expected}, as was written", "copy the parts again")
    begin, _ = sink.open()
    with bytes_bar("merging", sum(path.stat().st_size for path in paths)) as advance:
        for number, path in enumerate(paths):
            if number >= begin and (most is None or sink.taken < most):
                try:
                    with np.load(path) as file:
                        digests, empty = file["digests"].tobytes(), int(file["empty"])
                        chunk = Chunk(file["tokens"], file["lengths"], digests, file["characters"], empty)
                except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                    raise Damaged(f"{path}: {error}", "a part as it was written", "copy the part again") from error
                sink.take(chunk if most is None else first(chunk, most - sink.taken))
                if number % SAVE_EVERY == 0:
                    sink.save(number + 1, 0)
            advance(path.stat().st_size, f"{sink.taken:,} documents")
    sink.save(len(paths), 0)
