"""Write tokenized documents to train.bin and val.bin so that a kill at any moment does not change the result.

`BinWriter` keeps the source's order and holds out documents by a hash of their content. `ShuffledBinWriter` writes
nanoGPT's shuffled order: it appends each document to a bucket by its position in that order, and at the end sorts each
bucket in memory. progress.json records the durable file sizes; a resumed job truncates the files to them.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gpt2box.data.dataset import SPLITS
from gpt2box.data.tokenizer import Tokens
from gpt2box.errors import BadInput
from gpt2box.utils.files import read_json_object, write_atomically
from gpt2box.utils.progress import log_line

DIGEST_BYTES = 16
BUCKET_DOCUMENTS = 100_000  # some 230 MB of tokens in OpenWebText
SORTED = "sorted"  # in progress.json: how many buckets are


@dataclass(frozen=True)
class DocumentBatch:
    """Hold the tokenized documents of one unit of work."""

    tokens: Tokens | Path  # all, each document's end-of-text token with it; or the file with them
    lengths: npt.NDArray[np.uint32]  # tokens of each
    digests: bytes  # DIGEST_BYTES of each
    characters: npt.NDArray[np.uint32]  # of each
    empty: int  # documents left out because there is nothing in them

    def documents(self) -> list[Tokens]:
        """Return the tokens of each document."""
        tokens: Tokens = self.tokens if isinstance(self.tokens, np.ndarray) else np.memmap(self.tokens, "<u2", "r")
        ends = self.lengths.cumsum(dtype=np.int64)
        return [tokens[end - length : end] for end, length in zip(ends, self.lengths, strict=True)]


def new_digest() -> Any:
    """Return a hash object for a document's UTF-8 text."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def truncate_batch(batch: DocumentBatch, count: int) -> DocumentBatch:
    """Return the batch's first `count` documents."""
    parts = batch.lengths[:count], batch.digests[: count * DIGEST_BYTES], batch.characters[:count]
    return DocumentBatch(batch.tokens, *parts, batch.empty)


def write_tokens(file: BinaryIO, documents: Iterable[Tokens]) -> None:
    """Write token ids as little-endian uint16."""
    file.writelines(ids.astype("<u2", copy=False).data for ids in documents)


class DuplicateFilter:
    """Find repeated digests. Takes 16 bytes for each; a Python set would take about 100."""

    RECENT = 1 << 19

    def __init__(self, digests: bytes) -> None:
        self.sorted_digests = np.unique(np.frombuffer(digests, dtype=f"S{DIGEST_BYTES}"))
        self.recent: set[bytes] = set()

    def mark_first(self, digests: bytes) -> npt.NDArray[np.bool_]:
        """Return which of the concatenated digests occur for the first time."""
        new = np.frombuffer(digests, dtype=f"S{DIGEST_BYTES}")
        positions = np.searchsorted(self.sorted_digests, new)
        is_first = np.ones(len(new), dtype=bool)
        inside = positions < len(self.sorted_digests)
        is_first[inside] = self.sorted_digests[positions[inside]] != new[inside]
        for index in np.flatnonzero(is_first):
            digest = digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
            is_first[index] = digest not in self.recent
            self.recent.add(digest)
        if len(self.recent) > self.RECENT:
            added = np.array(sorted(self.recent), dtype=self.sorted_digests.dtype)
            self.sorted_digests, self.recent = np.sort(np.concatenate([self.sorted_digests, added])), set()
        return is_first


class BinWriter:
    """Write documents in source order, hold out by content hash and drop exact duplicates."""

    def __init__(self, folder: Path, val_fraction: float, seed: int, drop_duplicates: bool, tail: bool = False) -> None:
        self.folder, self.drop_duplicates = folder, drop_duplicates
        self.tail = 1 - val_fraction if tail else None  # the end of each document is held out
        self.threshold = round(val_fraction * 2**64)
        self.key = seed.to_bytes(8, "little")
        self.duplicates = DuplicateFilter(b"")
        self.files: dict[str, BinaryIO] = {}
        self.state: dict[str, Any] = {"sizes": {}, "counts": {}, "file": 0, "unit": 0}

    def open(self) -> tuple[int, int]:
        """Open the files, truncated to their durable sizes; return the file and unit to resume from."""
        stored = read_json_object(self.folder / "progress.json")
        if "sizes" in stored and all(
            (self.folder / name).exists() and (self.folder / name).stat().st_size >= size
            for name, size in stored["sizes"].items()
        ):
            self.state = stored
        for name in self.output_names():
            size = self.state["sizes"].setdefault(name, 0)
            path = self.folder / name
            path.touch()
            os.truncate(path, size)
            self.files[name] = open(path, "ab")  # noqa: SIM115, closed by finish
        if self.drop_duplicates:
            self.duplicates = DuplicateFilter((self.folder / "digests").read_bytes())
        return self.state["file"], self.state["unit"]

    def output_names(self) -> list[str]:
        """Return the names of the files that are appended to."""
        return ["train.bin", "val.bin", *(["digests"] if self.drop_duplicates else [])]

    @property
    def document_count(self) -> int:
        """Return the number of documents so far, including duplicates."""
        return int(self.state["counts"].get("documents", 0))

    def add_count(self, name: str, by: int) -> None:
        """Add to a count for the manifest."""
        self.state["counts"][name] = self.state["counts"].get(name, 0) + int(by)

    def write_batch(self, batch: DocumentBatch) -> None:
        """Write the documents of the next unit."""
        count = len(batch.lengths)
        digests = [batch.digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] for i in range(count)]
        is_blank = batch.characters == 0
        is_kept = ~is_blank
        if self.drop_duplicates:
            is_kept &= self.duplicates.mark_first(batch.digests)
            self.files["digests"].write(b"".join(digests[i] for i in np.flatnonzero(is_kept)))
        drawn = [hashlib.blake2b(digest, key=self.key, digest_size=8).digest() for digest in digests]
        held_out = np.array([int.from_bytes(number, "little") < self.threshold for number in drawn], dtype=bool)
        documents = batch.documents()
        if self.tail is None:
            write_tokens(self.files["train.bin"], (documents[i] for i in np.flatnonzero(is_kept & ~held_out)))
            write_tokens(self.files["val.bin"], (documents[i] for i in np.flatnonzero(is_kept & held_out)))
            self.count_splits(batch, is_kept & ~held_out, is_kept & held_out)
        else:
            cuts = [(documents[i], int(batch.lengths[i] * self.tail)) for i in np.flatnonzero(is_kept)]
            write_tokens(self.files["train.bin"], (ids[:cut] for ids, cut in cuts))
            write_tokens(self.files["val.bin"], (ids[cut:] for ids, cut in cuts))
            self.count_splits(batch, is_kept, is_kept)
        self.add_count("empty", is_blank.sum())
        self.add_count("duplicates", (~is_kept & ~is_blank).sum())
        self.add_count("documents", count)

    def count_splits(self, batch: DocumentBatch, train: npt.NDArray[np.bool_], val: npt.NDArray[np.bool_]) -> None:
        """Count the documents and characters of each split."""
        shares = (1.0, 1.0) if self.tail is None else (self.tail, 1 - self.tail)
        for split, chosen, share in zip(SPLITS, (train, val), shares, strict=True):
            self.add_count(f"{split} documents", chosen.sum())
            self.add_count(f"{split} characters", round(share * int(batch.characters[chosen].sum(dtype=np.int64))))
        self.add_count("empty", batch.empty)
        longest = int(batch.lengths.max(initial=0))
        self.state["counts"]["longest"] = max(self.state["counts"].get("longest", 0), longest)

    def save(self, file: int, unit: int) -> None:
        """Sync everything written so far, and record the file and unit that come next."""
        for name, stream in self.files.items():
            stream.flush()
            os.fsync(stream.fileno())
            self.state["sizes"][name] = os.fstat(stream.fileno()).st_size
        self.state |= {"file": file, "unit": unit}
        write_atomically(self.folder / "progress.json", json.dumps(self.state))

    def finish(self) -> dict[str, int]:
        """Complete and close the files; return the counts. Temporary files stay until the dataset is published."""
        if self.tail is None and self.threshold:
            self.hold_out_end()
        return self.close()

    def close(self) -> dict[str, int]:
        """Close the files and return the counts."""
        for stream in self.files.values():
            stream.close()
        return dict(self.state["counts"])

    def hold_out_end(self) -> None:
        """Hold out the end of the text if the content hash held out too little, as it may with few documents.

        The cut is at the document start nearest to the wanted share, or inside a document if none is near.
        """
        train, val = (self.folder / f"{split}.bin" for split in SPLITS)
        total = (train.stat().st_size + val.stat().st_size) // 2
        wanted = int(total * self.threshold / 2**64)
        if val.stat().st_size // 2 >= wanted / 10 or not self.state["sizes"]["train.bin"]:
            return
        tokens = np.memmap(train, "<u2", "r")
        cut = max(len(tokens) - wanted, 0)
        end_of_text, near = tokens[-1], max(cut - wanted // 2, 0)
        begins = near + 1 + np.flatnonzero(tokens[near : len(tokens) - wanted // 2] == end_of_text)
        if len(begins):
            cut = int(begins[np.abs(begins - cut).argmin()])
        moved = tokens[cut:]
        write_tokens(self.files["val.bin"], (moved[i : i + (1 << 22)] for i in range(0, len(moved), 1 << 22)))
        counts, documents = self.state["counts"], int((moved == end_of_text).sum())
        share = round(counts["train characters"] * len(moved) / len(tokens))
        for split, sign in zip(SPLITS, (-1, 1), strict=True):
            counts[f"{split} characters"] += sign * share
            counts[f"{split} documents"] += sign * documents
        self.files["val.bin"].flush()
        os.fsync(self.files["val.bin"].fileno())
        os.truncate(train, cut * 2)  # ended before: done again; ended after: all begins anew
        self.save(self.state["file"], self.state["unit"])
        log_line(
            f"note: chance held out too few of {counts['documents']:,} documents, so the end of the text is held out"
        )


class ShuffledBinWriter(BinWriter):
    """Write nanoGPT's order and split: `datasets.Dataset.train_test_split(test_size=…, seed=…, shuffle=True)`.

    That draws one permutation of all documents from NumPy's default generator; its start is the validation set.
    """

    def __init__(self, folder: Path, documents: int, val_fraction: float, seed: int) -> None:
        super().__init__(folder, val_fraction, seed, drop_duplicates=False)
        order = np.random.default_rng(seed).permutation(documents)
        self.position = np.empty(documents, dtype=np.int64)  # of a document in that order
        self.position[order] = np.arange(documents)
        self.held_out = math.ceil(val_fraction * documents)
        self.buckets = -(-(documents - self.held_out) // BUCKET_DOCUMENTS)
        self.documents = documents

    def output_names(self) -> list[str]:
        if SORTED in self.state:
            return ["train.bin", "val.bin"]
        return [f"bucket-{index}{kind}" for index in range(-1, self.buckets) for kind in (".bin", ".idx")]

    def write_batch(self, batch: DocumentBatch) -> None:
        begin = self.document_count
        count = len(batch.lengths)
        if begin + count > self.documents:
            raise BadInput(f"more than the {self.documents:,} documents that were announced", "the pinned files")
        position = self.position[begin : begin + count]
        bucket = np.where(position < self.held_out, -1, (position - self.held_out) // BUCKET_DOCUMENTS)
        documents = batch.documents()
        for index in np.unique(bucket):
            chosen = np.flatnonzero(bucket == index)
            write_tokens(self.files[f"bucket-{index}.bin"], (documents[i] for i in chosen))
            records = np.stack([position[chosen], batch.lengths[chosen].astype(np.int64)], axis=1)
            self.files[f"bucket-{index}.idx"].write(records.astype("<i8").tobytes())
        self.count_splits(batch, bucket >= 0, bucket < 0)
        self.add_count("documents", count)

    def finish(self) -> dict[str, int]:
        if self.document_count != self.documents:
            raise BadInput(f"{self.document_count:,} documents", f"{self.documents:,}, as announced")
        if SORTED not in self.state:
            for stream in self.files.values():
                stream.close()
            self.files = {}
            self.state |= {SORTED: -1, "sizes": {}}
            write_atomically(self.folder / "progress.json", json.dumps(self.state))
            self.open()
        for index in range(self.state[SORTED], self.buckets):
            write_tokens(self.files["train.bin" if index >= 0 else "val.bin"], self.load_sorted_bucket(index))
            self.state[SORTED] = index + 1
            self.save(self.state["file"], self.state["unit"])
            for kind in (".bin", ".idx"):
                (self.folder / f"bucket-{index}{kind}").unlink(missing_ok=True)
        for stray in self.folder.glob("bucket-*"):
            stray.unlink()
        return self.close()

    def load_sorted_bucket(self, index: int) -> list[Tokens]:
        """Load a bucket's documents, sorted by position."""
        tokens = np.fromfile(self.folder / f"bucket-{index}.bin", dtype="<u2")
        records = np.fromfile(self.folder / f"bucket-{index}.idx", dtype="<i8").reshape(-1, 2)
        ends = records[:, 1].cumsum()
        return [tokens[ends[i] - records[i, 1] : ends[i]] for i in np.argsort(records[:, 0])]
