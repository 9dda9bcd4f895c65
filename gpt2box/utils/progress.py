"""Log lines and show progress: a bar on a terminal, occasional lines in a log.

Both show the same figures. A line is printed at most every `LINE_SECONDS`, so that a container's log stays readable.
During training, lines are also appended to the run's log file.
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
_logs: dict[Path, int] = {}  # open log files and their descriptors
_redirects: list[StderrRedirect] = []


class BestEffortFile(io.FileIO):
    """Standard error or a terminal, written without errors.

    A closed terminal or a full disk must not end the run.
    """

    def write(self, data: ReadableBuffer) -> int:
        with suppress(OSError):
            if written := super().write(data):  # None if the write would block
                return written
        return memoryview(data).nbytes


def open_text_stream(descriptor: int, closefd: bool = False) -> io.TextIOWrapper:
    """Open a line-buffered text stream that ignores write errors."""
    raw = io.BufferedWriter(BestEffortFile(descriptor, "w", closefd=closefd))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def log_line(text: str = "") -> None:
    """Log a line to standard error and the log files. Only rank 0 prints; standard output is for results."""
    text = escape_control_lines(text)  # names from outside may contain terminal control sequences
    if rank_info().is_rank_0:
        print(text, file=sys.stderr, flush=True)
    log_to_file(text)


def log_from_signal_handler(text: str, ends: bool = True) -> None:
    """Log a line from a signal handler. Bypasses Python's buffers, which the interrupted code may be using.

    An open panel shows the line when it redraws. If the process ends now, the line is written to the terminal and the
    cursor is restored.
    """
    if _redirects and not ends:
        _redirects[-1].request = text
    elif rank_info().is_rank_0:
        with suppress(OSError):
            line = f"{SHOW_CURSOR}\n{text}\n" if _redirects else f"{text}\n"
            os.write(_redirects[-1].terminal if _redirects else 2, line.encode())
    log_to_file(text)


def log_to_file(text: str) -> None:
    """Append lines with a timestamp to the open log files only."""
    for descriptor in _logs.values():
        lines = "".join(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n" for line in text.splitlines())
        with suppress(OSError):  # saving a checkpoint reports a full disk
            os.write(
                descriptor, lines.encode("utf-8", errors="replace")
            )  # unbuffered, so that signal handlers can call this


@contextmanager
def run_log_file(path: Path) -> Iterator[None]:
    """Append log lines to a file inside the block, and the error that ends it."""
    descriptor = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    _logs[path] = descriptor
    try:
        yield
    except Exception as error:
        log_to_file(str(error) if isinstance(error, Gpt2boxError) else f"ended by {type(error).__name__}: {error}")
        raise
    finally:
        while _redirects:  # an error left the redirect open; print its traceback to the terminal
            _redirects[-1].close()
        del _logs[path]
        os.close(descriptor)


class StderrRedirect:
    """Redirect standard error to the log file while a panel is on the terminal.

    This captures the messages that libraries in C++ write directly, and they survive a crash. The panel shows them with
    `news`.
    """

    def __init__(self) -> None:
        self.terminal = os.dup(2)
        self.request = ""  # a signal handler's message, for the panel
        self._log: BinaryIO | None = None
        for path, descriptor in list(_logs.items())[-1:]:
            self._log = open(path, "rb")  # noqa: SIM115, closed below
            self._log.seek(0, os.SEEK_END)
            os.dup2(descriptor, 2)
        _redirects.append(self)

    def news(self) -> list[str]:
        """Return the lines that libraries wrote since the last call.

        Lines of log_to_file have a timestamp and are left out.
        """
        lines = self._log.read().decode("utf-8", errors="replace").splitlines() if self._log else []
        return [line for line in lines if not TIMESTAMP.match(line)]

    def close(self) -> None:
        """Restore standard error."""
        _redirects.remove(self)
        os.dup2(self.terminal, 2)
        os.close(self.terminal)
        if self._log:
            self._log.close()


def gpt2box_command(*words: str) -> str:
    """Format a command to paste. The program is given by its path if it is not the one on PATH."""
    program, found = sys.argv[0], shutil.which("gpt2box")
    if Path(program).name == "gpt2box" and "/" in program and os.path.abspath(program) != found:
        return shlex.join([program, *words])
    return shlex.join(
        [*(["python", "-m"] if Path(program).parts[-2:] == ("gpt2box", "__main__.py") else []), "gpt2box", *words]
    )


def format_duration(seconds: float) -> str:
    """Format seconds as 42s, 3m 05s, 2h 10m or 4d 3h."""
    if not abs(seconds) < 1e12:  # the speed from a damaged file can be anything
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
    """Format a count with its noun: 1 step, 2 steps."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def format_bytes(count: float, decimals: int = 1) -> str:
    """Format a number of bytes with a suitable unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.{decimals}f} {unit}"
        count /= 1024
    raise AssertionError


class AdvanceProgress(Protocol):
    """Report how many more bytes are done, and an optional note."""

    def __call__(self, count: int, note: str = "") -> None: ...


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[AdvanceProgress]:
    """Show the progress of `total` bytes; yield the function that reports how many more are done."""
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
            )  # bytes of an earlier attempt do not count towards the speed
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
