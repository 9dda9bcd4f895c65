"""Run gpt2box commands in this process or in forked ones."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gpt2box.cli import main
from tests.helpers.settings import ROOT

STEERING = "\x1b]0;title\x07\x1b[2J"  # terminal control sequences
Command = Callable[..., subprocess.CompletedProcess[str]]


class Forked:
    """Run commands in processes forked from one that has imported PyTorch already (command_server.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "helpers" / "command_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
            cwd=folder,
        )
        assert self.process.stdout is not None and json.loads(self.process.stdout.readline()) == "ready"

    def run(self, arguments: Sequence[str], folder: Path, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in a folder with this process's current environment. `text`: its standard input."""
        assert self.process.stdin is not None and self.process.stdout is not None
        paths = [self.folder / name for name in ("input", "output", "errors")]
        paths[0].write_text(text, encoding="utf-8")
        request = {
            "arguments": arguments,
            "environment": os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            "all_of_it": True,
            "folder": str(folder),
            "input": str(paths[0]),
            "outputs": [str(path) for path in paths[1:]],
            "kill_after": 300,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = json.loads(self.process.stdout.readline())["code"]
        output, errors = (path.read_text(encoding="utf-8", errors="replace") for path in paths[1:])
        return subprocess.CompletedProcess(["gpt2box", *arguments], code, output, errors)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def command(*arguments: str) -> tuple[object, str]:
    """Run a command in this process. Returns its exit code and its output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpt2box", *arguments])
        with contextlib.redirect_stdout(said := Said()), contextlib.redirect_stderr(said):
            try:
                main.main()
            except SystemExit as ended:
                return ended.code, said.text
    return 0, said.text


class Said:
    """A text stream that records what is written, and is not a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def isatty(self) -> bool:
        return False
