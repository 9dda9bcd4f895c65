"""Files of a run that grow while one looks: only what is new is read."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from gpt2box.runs.history import READ_CHUNK_BYTES, CurveBuffer
from gpt2box.utils.files import regular
from gpt2box.utils.paths import run_folders

TAIL_BYTES = 1 << 20  # of metrics.jsonl: enough for the last line of each kind, whatever the length of the run
MAX_READ_SECONDS = 0.5  # of reading before an answer; the rest of a long file is read at the next


class MetricsTail:
    """A metrics.jsonl, read on from where the last reading ended; from its beginning where another took its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures = CurveBuffer()
        self.generation = ""  # what was handed out of an earlier one is void
        self.share = 1.0  # read, of the file
        self._inode = self._offset = 0

    def read_on(self) -> None:
        """Take in what was appended, for about SECONDS. A line that is being written is left for the next time."""
        try:
            with open(self.path, "rb", opener=regular) as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:  # a resumed run writes it anew
                    self._begin_anew(found.st_ino)
                file.seek(self._offset)
                end = time.monotonic() + MAX_READ_SECONDS
                self.share = 1.0
                while lines := complete_lines(file.read(READ_CHUNK_BYTES) + file.readline()):
                    self.figures.add(lines)
                    self._offset += len(lines)
                    if time.monotonic() > end and self._offset < found.st_size:
                        self.share = self._offset / found.st_size
                        break
        except OSError:
            if self._inode:
                self._begin_anew(0)

    def _begin_anew(self, inode: int) -> None:
        self.figures, self._inode, self._offset = CurveBuffer(), inode, 0
        self.generation = secrets.token_hex(4)


def complete_lines(piece: bytes) -> bytes:
    """Up to the last line's end."""
    return piece[: piece.rfind(b"\n") + 1]


def find_newest_run() -> Path | None:
    """The run that was written to last."""
    found = [path / "metrics.jsonl" for path in run_folders() if (path / "metrics.jsonl").exists()]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent if newest else None


def read_tail(path: Path, most_bytes: int = TAIL_BYTES) -> str:
    """The end of a file that may be long or not there; begins at a line's start."""
    try:
        with open(path, "rb", opener=regular) as file:
            start = max(os.fstat(file.fileno()).st_size - most_bytes, 0)
            file.seek(start)
            content = file.read().decode("utf-8", errors="replace")
    except (FileNotFoundError, IsADirectoryError):
        return ""
    return content.partition("\n")[2] if start else content
