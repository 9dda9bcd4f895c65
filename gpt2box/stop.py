"""Ctrl-C and SIGTERM as a request to stop at the next safe point. Imported before torch, which takes seconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gpt2box.progress import say


class StopRequest:
    """Set by the first signal while it is awaited; a second one, or one at another time, ends the process at once."""

    def __init__(self) -> None:
        self.name = ""
        self._awaited = False

    def __bool__(self) -> bool:
        return bool(self.name)

    def install(self) -> StopRequest:
        """Take over SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        return self

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """While this lasts, somebody looks at the request."""
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name or not self._awaited:
            # Not an exception: raised inside an import, some library's `except` would swallow it.
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        say(f"{self.name}: finishing this step, then saving. Once more to stop at once, without saving.")
