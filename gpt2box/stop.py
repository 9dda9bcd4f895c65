"""Ctrl-C and SIGTERM as a request to stop at the next safe point. Imported before torch, which takes seconds."""

from __future__ import annotations

import os
import signal
from types import FrameType

from gpt2box.progress import say


class StopRequest:
    """Set by the first signal; a second one ends the process at once."""

    def __init__(self) -> None:
        self.name = ""

    def __bool__(self) -> bool:
        return bool(self.name)

    def install(self) -> StopRequest:
        """Take over SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        say(f"{self.name}: finishing this step, then saving. Once more to stop at once, without saving.")
