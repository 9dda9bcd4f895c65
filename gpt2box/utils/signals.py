"""Ctrl-C, SIGTERM and a terminal that is closed (SIGHUP) as a request to stop at the next safe point.

Imported before torch, which takes seconds.

Exit code 0 where that point was reached; else 128 and the signal's number, and a line that says what is kept.
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
    """Set by the first signal while it is awaited; a second one, or one at another time, ends the process at once."""

    def __init__(self) -> None:
        self.name = ""  # also where a signal came to another rank
        self._came = self._awaited = False
        self._at_another_time = BEFORE

    def __bool__(self) -> bool:
        return bool(self.name)

    def install(self) -> StopRequest:
        """Take over SIGNALS."""
        for number in handled_signals():
            signal.signal(number, self._handle)
        return self

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """While this lasts, somebody looks at the request."""
        self._awaited, later = True, UNSAVED
        try:
            yield
            later = AFTER
        finally:
            self._awaited, self._at_another_time = False, later

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, hung_up = signal.Signals(number).name, number == signal.SIGHUP
        if hung_up and self.name:
            return  # the shell and the system each send it, and a session's manager SIGTERM after it
        if self._came or not self._awaited:
            log_from_signal_handler(f"{name}: {UNSAVED if self._awaited else self._at_another_time}")
            # Not an exception: raised inside an import, some library's `except` would swallow it.
            os._exit(128 + number)
        self._came, self.name = not hung_up, self.name or name
        log_from_signal_handler(
            f"{name}: finishing this step, then saving. Once more to stop at once, without saving.", ends=False
        )


def handled_signals() -> list[signal.Signals]:
    """SIGNALS, but for a SIGHUP that nohup has ignored."""
    return [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """While data are prepared: a signal is raised here, so that what is under way ends its processes and tidies up,
    which may take seconds; a second one does not wait for that.

    Raises SystemExit: after a signal, whatever became of it on its way.
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
