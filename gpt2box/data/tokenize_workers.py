"""Many documents to tokens: worker processes read and tokenise units, this process writes them down in order.

Which bytes come out follows from the files and the request alone, not from the number of workers or where it was
killed.
"""

from __future__ import annotations

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

from gpt2box.data.bin_writer import Chunk, Sink, digest_of, first, new_digest
from gpt2box.data.bulk_tokenizer import BulkEncoder
from gpt2box.data.readers import Unit, texts, units_of
from gpt2box.data.tokenizer import Tokens
from gpt2box.errors import MachineCannot
from gpt2box.system import host
from gpt2box.utils.progress import Advance, bytes_bar

MEMORY_OF_A_WORKER = 1 << 30
SPILL_BYTES = 1 << 27  # of a unit's tokens
SAVE_SECONDS = 10.0  # at most so much work is done again after a kill
FILES_AHEAD = 2  # brought before they are needed


@dataclass(frozen=True)
class Source:
    """A file that is there or can be brought."""

    name: str
    size_bytes: int
    bring: Callable[[], Path]
    done: Callable[[], None]  # called when it is tokenised and durable
    leave: Callable[[], None]  # called where it is only looked at: another job may have it in between
    sha256: str = ""  # where known beforehand


_encoder: BulkEncoder | None = None  # a worker's own


def start_worker(words: Path) -> None:
    """Each worker has a tokenizer of its own, and ends with the process that started it, however that ends."""
    global _encoder
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = BulkEncoder(words)


def end_with_parent() -> None:
    """A worker would wait for work for ever where the process that gives it was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def tokenise(unit: Unit, end_of_text: int, spill: Path) -> Chunk:
    """A unit's documents as tokens; those that are blank are left out, but for Parquet's, whose number is announced:
    these have no characters.

    What is too large for a pipe goes through the file `spill`.
    """
    assert _encoder is not None
    tokens: list[Tokens] = []
    lengths, digests, characters, empty = [], [], [], 0
    tail = np.array([end_of_text], dtype=np.uint16)
    held = 0
    spill.unlink(missing_ok=True)
    for parts in texts(unit):
        seen = Reading(parts)
        length, begin = 0, len(tokens)
        for ids in _encoder.encode(seen):
            tokens.append(ids)
            length, held = length + len(ids), held + ids.nbytes
            if held > SPILL_BYTES and not seen.blank:
                append(tokens, spill)
                held = 0
        if seen.blank and unit.groups is None:
            empty += 1
            del tokens[begin:]
            continue
        tokens.append(tail)
        lengths.append(length + 1)
        digests.append(digest_of(seen.digest))
        characters.append(0 if seen.blank else seen.characters)
    counts = [np.array(values, dtype=np.uint32) for values in (lengths, characters)]
    if spill.exists():
        append(tokens, spill)
        return Chunk(spill, counts[0], b"".join(digests), counts[1], empty)
    joined = np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.uint16)
    return Chunk(joined, counts[0], b"".join(digests), counts[1], empty)


class Reading:
    """A document's parts as they go by, and what they come to."""

    def __init__(self, parts: Iterator[str]) -> None:
        self.parts, self.digest, self.characters, self.blank = parts, new_digest(), 0, True

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            self.digest.update(part.encode("utf-8", "surrogatepass"))
            self.characters += len(part)
            self.blank = self.blank and not part.strip()
            yield part


def append(tokens: list[Tokens], path: Path) -> None:
    """Move tokens to the end of a file."""
    with open(path, "ab") as file:
        file.writelines(ids.astype("<u2", copy=False).data for ids in tokens)
    tokens.clear()


def usual_workers() -> int:
    """As many as there are cores, and memory for."""
    return max(1, min(int(host.cores()), 16, host.memory_bytes()[1] // MEMORY_OF_A_WORKER - 1))


def run(
    sources: list[Source], sink: Sink, column: str, words: Path, end_of_text: int, workers: int, most: int | None
) -> None:
    """Tokenise all sources, up to `most` documents, into the sink; goes on where an earlier run was ended.

    `words`: GPT-2's ranks, or the folder of another tokenizer.

    Files are brought while others are worked on.

    Raises:
        Gpt2boxError: what a file or a download has.
        MachineCannot: a worker was killed, as when memory runs out.
    """
    first_file, first_unit = sink.open()
    # Forked processes would inherit this one's threads' locks; a fresh one imports a few small modules.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (words,))
    try:
        with bytes_bar("tokenising", sum(source.size_bytes for source in sources)) as advance:
            advance(sum(source.size_bytes for source in sources[:first_file]))
            writer = Writer(sink, sources, advance, most)
            coming: deque[Future[Path]] = deque()
            for number in range(first_file, len(sources)):
                ahead = sources[number + len(coming) : number + 1 + FILES_AHEAD]
                coming += [aside(source.bring) for source in ahead]
                brought = coming.popleft()
                # Another job may have the next file and wait for one of those before: they are finished first.
                while writer.waiting and not brought.done():
                    writer.take()
                units = units_of(brought.result(), sources[number].name, column)
                for index in range(first_unit if number == first_file else 0, len(units)):
                    if writer.full:
                        break
                    while len(writer.waiting) > 2 * workers:
                        writer.take()
                    spill = sink.folder / f"spill-{number}-{index}"
                    future = pool.submit(tokenise, units[index], end_of_text, spill)
                    writer.waiting.append((future, number, index, len(units)))
                if writer.full:
                    break
            while writer.waiting:
                writer.take()
            sink.save(len(sources), 0)
    except BrokenProcessPool as error:
        raise MachineCannot(
            "a worker was killed; mostly that is the system when memory runs out",
            "about 1 GiB of memory for each worker",
            f"fewer workers (there were {workers}): --workers {max(workers // 2, 1)}; it goes on where it was",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def aside(work: Callable[[], Path]) -> Future[Path]:
    """Do it in a thread that nobody waits for when the program ends, as the pools of the library would."""
    future: Future[Path] = Future()

    def run_it() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run_it, daemon=True).start()
    return future


class Writer:
    """Takes finished units in order and writes them down."""

    def __init__(self, sink: Sink, sources: list[Source], advance: Advance, most: int | None) -> None:
        self.sink, self.sources, self.advance, self.most = sink, sources, advance, most
        self.waiting: deque[tuple[Future[Chunk], int, int, int]] = deque()  # result, file, unit, units of the file
        self.saved = time.monotonic()
        self.tokens = 0
        self.full = False

    def take(self) -> None:
        """Wait for the next unit."""
        future, file, unit, units = self.waiting.popleft()
        chunk = future.result()
        if self.most is not None:
            chunk = first(chunk, max(self.most - self.sink.taken, 0))
        self.sink.take(chunk)
        if isinstance(chunk.tokens, Path):
            chunk.tokens.unlink()
        self.full = self.most is not None and self.sink.taken >= self.most
        self.tokens += int(chunk.lengths.sum(dtype=np.int64))
        size_bytes = self.sources[file].size_bytes
        share = size_bytes * (unit + 1) // units - size_bytes * unit // units
        self.advance(share, f"{self.sink.taken:,} documents, {self.tokens:,} tokens")
        last = unit == units - 1
        if last or time.monotonic() - self.saved > SAVE_SECONDS:
            self.sink.save(*((file + 1, 0) if last else (file, unit + 1)))
            self.saved = time.monotonic()
        if last:
            self.sources[file].done()
