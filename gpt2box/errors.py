"""Expected failures, each with its exit code and what was found, what was expected and the next command.

Every failure that a user can meet on a healthy installation is raised as one of these and printed without a traceback
(cli/main.py). Any other exception is a bug.
"""

import re

# Control characters, and those that change the text's direction.
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_LINE_CHARS = 1500  # characters of a line


class Gpt2boxError(Exception):
    """An expected failure. `found` is required; `expected` and `next_step` where they help."""

    exit_code = 1

    def __init__(self, found: str, expected: str = "", next_step: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.next_step = next_step

    def __str__(self) -> str:
        lines = [f"error: {self.found}"]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.next_step:
            lines.append(f"  next: {self.next_step}")
        return "\n".join(printable_line(line) for line in "\n".join(lines).split("\n"))


def printable_line(line: str) -> str:
    """Escape control characters and truncate a long line, for a terminal.

    Messages quote names and values from outside, which may hold anything.
    """
    return escape_control(line[:MAX_LINE_CHARS]) + (
        f"… ({len(line):,} characters)" if len(line) > MAX_LINE_CHARS else ""
    )


def escape_control_lines(text: str) -> str:
    """Escape the control characters of each line, but keep the line breaks."""
    return "\n".join(map(escape_control, text.split("\n")))


def escape_control(text: str) -> str:
    """Escape all control characters, line breaks included."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def describe_error(error: Exception) -> str:
    """Describe an error from reading a file, for a user who has the file but not the code."""
    if isinstance(error, Gpt2boxError):
        return error.found
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, UnicodeError):
        return f"no text in UTF-8: {error}"
    if isinstance(error, TypeError | AttributeError):
        return f"another form: {error}"
    return str(error) or type(error).__name__


class BadInput(Gpt2boxError):
    """Bad usage, a bad setting or a bad input file."""

    exit_code = 2


class MachineCannot(Gpt2boxError):
    """This machine cannot do it: no GPU, not enough memory, no compiler."""

    exit_code = 3


class Damaged(Gpt2boxError):
    """A dataset, checkpoint or downloaded file differs from what was written."""

    exit_code = 4


class TryAgain(Gpt2boxError):
    """A temporary failure, such as of the network; the same command may work later (EX_TEMPFAIL)."""

    exit_code = 75


class VolumeUnwritable(Gpt2boxError):
    """A volume is missing, read-only or full (EX_CONFIG)."""

    exit_code = 78
