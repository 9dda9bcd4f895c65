"""Many documents to tokens: worker processes read and tokenise units, this process writes them down in order.

Which bytes come out follows from the files and the request alone, not from the number of workers or where it was
killed.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2box.data.encoder import BulkEncoder
from gpt2box.data.records import Unit, texts, units_of
from gpt2box.data.sink import Chunk, Sink, digest_of, first, new_digest
from gpt2box.errors import MachineCannot
from gpt2box.progress import Advance, bytes_bar

SAVE_SECONDS = 10.0  # at most so much work is done again after a kill
FILES_AHEAD = 2  # brought before they are needed


@dataclass(frozen=True)
class Source:
    """A file that is there or can be brought."""

    name: str
    size_bytes: int
    bring: Callable[[], Path]
    done: Callable[[], None]  # called when it is tokenised and durable


_encoder: BulkEncoder | None = None


def start_worker(ranks: Path) -> None:
    """Each worker has a tokenizer of its own."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = BulkEncoder(ranks)


def tokenise(unit: Unit, end_of_text: int) -> Chunk:
    """A unit's documents as tokens; those that are blank are left out, but keep their number in the order."""
    assert _encoder is not None
    tokens, lengths, digests, characters, empty = [], [], [], [], 0
    tail = np.array([end_of_text], dtype=np.uint16)
    for parts in texts(unit):
        digest, count, document, blank = new_digest(), 0, [], True
        for part in whole_words(parts):
            digest.update(part.encode("utf-8", "surrogatepass"))
            count += len(part)
            blank = blank and not part.strip()
            document.append(_encoder.encode(part))
        if blank and unit.groups is None:
            empty += 1
            continue
        document.append(tail)
        tokens += document
        lengths.append(sum(map(len, document)))
        digests.append(digest_of(digest))
        characters.append(count)
    joined = np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.uint16)
    counts = [np.array(values, dtype=np.uint32) for values in (lengths, characters)]
    return Chunk(joined, counts[0], b"".join(digests), counts[1], empty)


def whole_words(parts: Iterator[str]) -> Iterator[str]:
    """The same text in parts that end where no token crosses (see encoder.py)."""
    from gpt2box.data.encoder import PIECE, SAFE_CUT

    held = ""
    for part in parts:
        held += part
        while len(held) > 2 * PIECE and (cut := SAFE_CUT.search(held, PIECE)):
            yield held[: cut.start()]
            held = held[cut.start() :]
    if held:
        yield held


def run(
    sources: list[Source], sink: Sink, column: str, ranks: Path, end_of_text: int, workers: int, most: int | None
) -> None:
    """Tokenise all sources, up to `most` documents, into the sink; goes on where an earlier run was ended.

    Files are brought while others are worked on.

    Raises:
        Gpt2boxError: what a file or a download has.
        MachineCannot: a worker was killed, as when memory runs out.
    """
    first_file, first_unit = sink.open()
    # Forked processes would inherit this one's threads' locks; a fresh one imports a few small modules.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (ranks,))
    bringer = ThreadPoolExecutor(1)
    try:
        with bytes_bar("tokenising", sum(source.size_bytes for source in sources)) as advance:
            advance(sum(source.size_bytes for source in sources[:first_file]))
            writer = Writer(sink, sources, advance, most)
            coming: deque[Future[Path]] = deque()
            for number in range(first_file, len(sources)):
                ahead = sources[number + len(coming) : number + 1 + FILES_AHEAD]
                coming += [bringer.submit(source.bring) for source in ahead]
                units = units_of(coming.popleft().result(), sources[number].name, column)
                for index in range(first_unit if number == first_file else 0, len(units)):
                    if writer.full:
                        break
                    while len(writer.waiting) > workers:
                        writer.take()
                    future = pool.submit(tokenise, units[index], end_of_text)
                    writer.waiting.append((future, number, index, len(units)))
                if writer.full:
                    break
            while writer.waiting:
                writer.take()
            sink.save(len(sources), 0)
    except BrokenProcessPool as error:
        raise MachineCannot(
            "a worker was killed, as the system does when memory runs out",
            "about 1 GiB of memory for each worker",
            f"fewer workers (there were {workers}): --workers {max(workers // 2, 1)}; it goes on where it was",
        ) from error
    finally:
        bringer.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=True, cancel_futures=True)


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
        self.full = self.most is not None and self.sink.taken >= self.most
        self.tokens += len(chunk.tokens)
        size_bytes = self.sources[file].size_bytes
        share = size_bytes * (unit + 1) // units - size_bytes * unit // units
        self.advance(share, f"{self.sink.taken:,} documents, {self.tokens:,} tokens")
        last = unit == units - 1
        if last or time.monotonic() - self.saved > SAVE_SECONDS:
            self.sink.save(*((file + 1, 0) if last else (file, unit + 1)))
            self.saved = time.monotonic()
        if last:
            self.sources[file].done()
