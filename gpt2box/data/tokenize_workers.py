"""Tokenize documents in worker processes; this process writes the results in order.

The bytes depend on the files and the choices alone, not on the number of workers or on interruptions.
"""

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2box.data.bin_writer import BinWriter, DocumentBatch, new_digest, truncate_batch
from gpt2box.data.bulk_tokenizer import BulkEncoder
from gpt2box.data.readers import Unit, read_documents, split_into_units
from gpt2box.data.tokenizer import Tokens
from gpt2box.errors import MachineCannot
from gpt2box.system import host
from gpt2box.utils.progress import AdvanceProgress, byte_progress

WORKER_MEMORY_BYTES = 1 << 30
SPILL_BYTES = 1 << 27  # of a unit's tokens
SAVE_SECONDS = 10.0  # at most this much work is repeated after a kill
FILES_AHEAD = 2  # downloaded before they are needed


@dataclass(frozen=True)
class SourceFile:
    """Describe a file that is local or can be downloaded."""

    name: str
    size_bytes: int
    fetch: Callable[[], Path]
    discard: Callable[[], None]  # called when its tokens are durable: deletes a download, releases its lock
    unlock: Callable[[], None]  # called after reading only metadata: another job may use the file
    sha256: str = ""  # where known beforehand


_encoder: BulkEncoder | None = None  # a worker's own


def start_worker(tokenizer_source: Path) -> None:
    """Load the worker's tokenizer, and make the worker exit with its parent process."""
    global _encoder
    threading.Thread(target=exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = BulkEncoder(tokenizer_source)


def exit_with_parent() -> None:
    """Exit when the parent process ends. Without this, a worker would wait forever after its parent was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def tokenize_unit(unit: Unit, end_of_text: int, spill: Path) -> DocumentBatch:
    """Tokenize a unit's documents.

    Leaves out blank documents, except of Parquet files, whose row count is announced: they count 0 characters. Results
    too large for a pipe go through the file `spill`.
    """
    assert _encoder is not None
    tokens: list[Tokens] = []
    lengths, digests, characters, empty = [], [], [], 0
    tail = np.array([end_of_text], dtype=np.uint16)
    pending_bytes = 0
    spill.unlink(missing_ok=True)
    for chunks in read_documents(unit):
        document = DocumentReader(chunks)
        length, begin = 0, len(tokens)
        for ids in _encoder.encode(document):
            tokens.append(ids)
            length, pending_bytes = length + len(ids), pending_bytes + ids.nbytes
            if pending_bytes > SPILL_BYTES and not document.is_blank:
                append_to_file(tokens, spill)
                pending_bytes = 0
        if document.is_blank and unit.groups is None:
            empty += 1
            del tokens[begin:]
            continue
        tokens.append(tail)
        lengths.append(length + 1)
        digests.append(document.digest.digest())
        characters.append(0 if document.is_blank else document.characters)
    counts = [np.array(values, dtype=np.uint32) for values in (lengths, characters)]
    if spill.exists():
        append_to_file(tokens, spill)
        return DocumentBatch(spill, counts[0], b"".join(digests), counts[1], empty)
    joined = np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.uint16)
    return DocumentBatch(joined, counts[0], b"".join(digests), counts[1], empty)


class DocumentReader:
    """Iterate over a document's chunks; compute its digest, its characters and if it is blank."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self.chunks, self.digest, self.characters, self.is_blank = chunks, new_digest(), 0, True

    def __iter__(self) -> Iterator[str]:
        for part in self.chunks:
            self.digest.update(part.encode("utf-8", "surrogatepass"))
            self.characters += len(part)
            self.is_blank = self.is_blank and not part.strip()
            yield part


def append_to_file(tokens: list[Tokens], path: Path) -> None:
    """Append tokens to a file and clear the list."""
    with open(path, "ab") as file:
        file.writelines(ids.astype("<u2", copy=False).data for ids in tokens)
    tokens.clear()


def default_worker_count() -> int:
    """Return the number of workers that cores and memory allow, at most 16."""
    return max(1, min(int(host.cpu_cores()), 16, host.memory_bytes()[1] // WORKER_MEMORY_BYTES - 1))


def tokenize_files(
    sources: list[SourceFile],
    bin_writer: BinWriter,
    column: str,
    tokenizer_source: Path,
    end_of_text: int,
    workers: int,
    max_documents: int | None,
) -> None:
    """Tokenize all sources, up to `max_documents` documents, into the writer; resume interrupted work.

    `tokenizer_source`: GPT-2's ranks, or the folder of another tokenizer.

    Files are downloaded while others are tokenized.

    Raises:
        Gpt2boxError: what a file or a download has.
        MachineCannot: a worker was killed, as when memory runs out.
    """
    first_file, first_unit = bin_writer.open()
    # Forked processes would inherit locks held by other threads; a spawned one imports only a few small modules.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (tokenizer_source,))
    try:
        with byte_progress("tokenising", sum(source.size_bytes for source in sources)) as advance:
            advance(sum(source.size_bytes for source in sources[:first_file]))
            batches = OrderedWriter(bin_writer, sources, advance, max_documents)
            downloads: deque[Future[Path]] = deque()
            for number in range(first_file, len(sources)):
                ahead = sources[number + len(downloads) : number + 1 + FILES_AHEAD]
                downloads += [run_in_daemon_thread(source.fetch) for source in ahead]
                download = downloads.popleft()
                # Another job may hold the next file and wait for an earlier one: finish those first, or both wait.
                while batches.waiting and not download.done():
                    batches.write_next()
                units = split_into_units(download.result(), sources[number].name, column)
                for index in range(first_unit if number == first_file else 0, len(units)):
                    if batches.is_full:
                        break
                    while len(batches.waiting) > 2 * workers:
                        batches.write_next()
                    spill = bin_writer.folder / f"spill-{number}-{index}"
                    future = pool.submit(tokenize_unit, units[index], end_of_text, spill)
                    batches.waiting.append((future, number, index, len(units)))
                if batches.is_full:
                    break
            while batches.waiting:
                batches.write_next()
            bin_writer.save(len(sources), 0)
    except BrokenProcessPool as error:
        raise MachineCannot(
            "a worker was killed; mostly that is the system when memory runs out",
            "about 1 GiB of memory for each worker",
            f"fewer workers (there were {workers}): --workers {max(workers // 2, 1)}; it goes on where it was",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_in_daemon_thread(work: Callable[[], Path]) -> Future[Path]:
    """Run work in a daemon thread, which does not delay exit; the standard library's thread pools would."""
    future: Future[Path] = Future()

    def run_it() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run_it, daemon=True).start()
    return future


class OrderedWriter:
    """Write finished units in order."""

    def __init__(
        self, bin_writer: BinWriter, sources: list[SourceFile], advance: AdvanceProgress, max_documents: int | None
    ) -> None:
        self.bin_writer, self.sources, self.advance, self.max_documents = bin_writer, sources, advance, max_documents
        # Result, index of its file, index of its unit, number of units in the file.
        self.waiting: deque[tuple[Future[DocumentBatch], int, int, int]] = deque()
        self.saved = time.monotonic()
        self.tokens = 0
        self.is_full = False

    def write_next(self) -> None:
        """Wait for the next unit and write it."""
        future, file, unit, units = self.waiting.popleft()
        batch = future.result()
        if self.max_documents is not None:
            batch = truncate_batch(batch, max(self.max_documents - self.bin_writer.document_count, 0))
        self.bin_writer.write_batch(batch)
        if isinstance(batch.tokens, Path):
            batch.tokens.unlink()
        self.is_full = self.max_documents is not None and self.bin_writer.document_count >= self.max_documents
        self.tokens += int(batch.lengths.sum(dtype=np.int64))
        size_bytes = self.sources[file].size_bytes
        share = size_bytes * (unit + 1) // units - size_bytes * unit // units
        self.advance(share, f"{self.bin_writer.document_count:,} documents, {self.tokens:,} tokens")
        last = unit == units - 1
        if last or time.monotonic() - self.saved > SAVE_SECONDS:
            self.bin_writer.save(*((file + 1, 0) if last else (file, unit + 1)))
            self.saved = time.monotonic()
        if last:
            self.sources[file].discard()
