"""Turn Ctrl-C, SIGTERM and a closed terminal (SIGHUP) into a request to stop at the next safe point.

Import this before torch, whose import takes seconds. The exit code is 0 if training reached that point; else it is 128
plus the signal's number, and a line says what was saved.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gpt2box.utils.progress import log_from_signal_handler

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BEFORE = "ended before training began: nothing is lost, the same command goes on where it was"
AFTER = "ended after training, which is saved; the same command says where"
UNSAVED = "ended without saving: the same command goes on from the last checkpoint"


class StopRequest:
    """A request to stop, set by the first signal that arrives inside `awaited`.

    Any other signal ends the process at once.
    """

    def __init__(self) -> None:
        self.name = ""  # also set if another rank received the signal
        self._came = self._awaited = False
        self._at_another_time = BEFORE

    def __bool__(self) -> bool:
        return bool(self.name)

    def install(self) -> StopRequest:
        """Install the handler for STOP_SIGNALS."""
        for number in handled_signals():
            signal.signal(number, self._handle)
        return self

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Accept stop requests inside the block; the caller polls for them."""
        self._awaited, later = True, UNSAVED
        try:
            yield
            later = AFTER
        finally:
            self._awaited, self._at_another_time = False, later

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, hung_up = signal.Signals(number).name, number == signal.SIGHUP
        if hung_up and self.name:
            return  # shell and kernel each send SIGHUP; the session manager then sends SIGTERM
        if self._came or not self._awaited:
            log_from_signal_handler(f"{name}: {UNSAVED if self._awaited else self._at_another_time}")
            # Do not raise an exception: an `except` around a library's import could swallow it.
            os._exit(128 + number)
        self._came, self.name = not hung_up, self.name or name
        log_from_signal_handler(
            f"{name}: finishing this step, then saving. Once more to stop at once, without saving.", ends=False
        )


def handled_signals() -> list[signal.Signals]:
    """Return STOP_SIGNALS, without SIGHUP if nohup has ignored it."""
    return [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Exit on a signal during data preparation, after the interrupted code has ended its processes and cleaned up.

    Cleaning up may take seconds; a second signal ends the process at once.

    Raises SystemExit: after a signal, even if the exception raised by the handler was swallowed.
    """
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if came:
            os._exit(128 + number)
        came.append(number)
        log_from_signal_handler(f"{signal.Signals(number).name}: {BEFORE}")
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, handle) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if came:
            raise SystemExit(128 + came[0])
