"""Progress of long work: a bar on a terminal, sober lines in a log.

Both show the same figures. A line is printed at most every `LINE_SECONDS`, so that a container's
log stays readable. While a run is trained, its lines are kept in its folder, too.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

from gpt2box.errors import Gpt2boxError, escape_control_lines
from gpt2box.utils.files import open_regular
from gpt2box.utils.ranks import rank_info

LINE_SECONDS = 10.0
SHOW_CURSOR = "\x1b[?25h"
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")
_logs: dict[Path, int] = {}  # the files that are kept now, and their descriptors
_redirects: list[StderrRedirect] = []


class BestEffortFile(io.FileIO):
    """Standard error, or a terminal, that may go away, or lie on a full disk: what is only said ends nothing."""

    def write(self, data: ReadableBuffer) -> int:
        with suppress(OSError):
            if written := super().write(data):  # none where it would have to wait
                return written
        return memoryview(data).nbytes


def open_text_stream(descriptor: int, closefd: bool = False) -> io.TextIOWrapper:
    """Text, line by line, to where nobody may listen any more."""
    raw = io.BufferedWriter(BestEffortFile(descriptor, "w", closefd=closefd))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def log_line(text: str = "") -> None:
    """A line for the user, on standard error: standard output is for results. Of several ranks the first speaks."""
    text = escape_control_lines(text)  # names from outside may hold what steers a terminal
    if rank_info().is_rank_0:
        print(text, file=sys.stderr, flush=True)
    log_to_file(text)


def log_from_signal_handler(text: str, ends: bool = True) -> None:
    """A line from a signal's handler: past Python's buffers, which may be in use just then.

    A panel shows it in its own time, unless the process ends now: then the panel's cursor is given back.
    """
    if _redirects and not ends:
        _redirects[-1].request = text
    elif rank_info().is_rank_0:
        with suppress(OSError):
            line = f"{SHOW_CURSOR}\n{text}\n" if _redirects else f"{text}\n"
            os.write(_redirects[-1].terminal if _redirects else 2, line.encode())
    log_to_file(text)


def log_to_file(text: str) -> None:
    """A line for the kept log alone, where one is kept."""
    for descriptor in _logs.values():
        lines = "".join(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n" for line in text.splitlines())
        with suppress(OSError):  # a full disk is for the checkpoint to say
            os.write(descriptor, lines.encode("utf-8", errors="replace"))  # at once, also from a signal's handler


@contextmanager
def run_log_file(path: Path) -> Iterator[None]:
    """Meanwhile, append what is said to a file, and what ends it where that is an error."""
    descriptor = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    _logs[path] = descriptor
    try:
        yield
    except Exception as error:
        log_to_file(str(error) if isinstance(error, Gpt2boxError) else f"ended by {type(error).__name__}: {error}")
        raise
    finally:
        while _redirects:  # an error came in between: what is printed of it is for the terminal
            _redirects[-1].close()
        del _logs[path]
        os.close(descriptor)


class StderrRedirect:
    """While a panel is on the terminal, the kept log takes what libraries in C++ write to standard error past Python.

    There it is also after a crash. `news` is for the panel, which prints it in its own time.
    """

    def __init__(self) -> None:
        self.terminal = os.dup(2)
        self.request = ""  # that a signal made of the training
        self._log: BinaryIO | None = None
        for path, descriptor in list(_logs.items())[-1:]:
            self._log = open(path, "rb")  # noqa: SIM115, closed below
            self._log.seek(0, os.SEEK_END)
            os.dup2(descriptor, 2)
        _redirects.append(self)

    def news(self) -> list[str]:
        """Lines that came since the last call; those of `note` have a time in front."""
        lines = self._log.read().decode("utf-8", errors="replace").splitlines() if self._log else []
        return [line for line in lines if not TIMESTAMP.match(line)]

    def close(self) -> None:
        """As it was before."""
        _redirects.remove(self)
        os.dup2(self.terminal, 2)
        os.close(self.terminal)
        if self._log:
            self._log.close()


def gpt2box_command(*words: str) -> str:
    """A command to paste: the program as it was called, by its path where the shell would not find it."""
    program, found = sys.argv[0], shutil.which("gpt2box")
    if Path(program).name == "gpt2box" and "/" in program and os.path.abspath(program) != found:
        return shlex.join([program, *words])
    return shlex.join(
        [*(["python", "-m"] if Path(program).parts[-2:] == ("gpt2box", "__main__.py") else []), "gpt2box", *words]
    )


def format_duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 3m 05s, 2h 10m, 4d 3h."""
    if not abs(seconds) < 1e12:  # of a pace that a damaged file says
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600}h"


def pluralize(count: int, what: str) -> str:
    """1 step, 2 steps."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def format_bytes(count: float, decimals: int = 1) -> str:
    """A number of bytes in a unit of fitting size."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.{decimals}f} {unit}"
        count /= 1024
    raise AssertionError


class AdvanceProgress(Protocol):
    """Says how many more bytes are done, and what else there is to say."""

    def __call__(self, count: int, note: str = "") -> None: ...


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[AdvanceProgress]:
    """Shows the progress of `total` bytes; yields the function that says how many more are done."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total or None, note="")

            def move(count: int, note: str = "") -> None:
                bar.update(task, advance=count, note=note)

            yield move
        return
    start = last = time.monotonic()
    done = before = 0

    def advance(count: int, note: str = "") -> None:
        nonlocal done, last, before
        if not done:
            before = (
                count if time.monotonic() - start < 0.05 else 0
            )  # an earlier attempt's share is not this one's speed
        done += count
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            rate = max(done - before, 1) / (now - start)
            left = f", {format_duration((total - done) / rate)} left" if total else ""
            log_line(
                f"{what}: {format_bytes(done)} of {format_bytes(total)}, {format_bytes(rate)}/s{left}"
                + (f"; {note}" if note else "")
            )

    yield advance
