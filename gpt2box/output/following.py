"""Files of a run that grow while one looks: only what is new is read."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from gpt2box.files import regular
from gpt2box.output.curves import PIECE_BYTES, Figures

SECONDS = 0.5  # of reading before an answer; the rest of a long file is read at the next


class Follower:
    """A metrics.jsonl, read on from where the last reading ended; from its beginning where another took its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures = Figures()
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
                end = time.monotonic() + SECONDS
                self.share = 1.0
                while lines := whole_lines(file.read(PIECE_BYTES) + file.readline()):
                    self.figures.add(lines)
                    self._offset += len(lines)
                    if time.monotonic() > end and self._offset < found.st_size:
                        self.share = self._offset / found.st_size
                        break
        except OSError:
            if self._inode:
                self._begin_anew(0)

    def _begin_anew(self, inode: int) -> None:
        self.figures, self._inode, self._offset = Figures(), inode, 0
        self.generation = secrets.token_hex(4)


def whole_lines(piece: bytes) -> bytes:
    """Up to the last line's end."""
    return piece[: piece.rfind(b"\n") + 1]
