"""Run gpt2box commands that are killed, or whose disk fails, at a chosen call or time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2box.data.downloads import sha256_of
from tests.helpers.settings import ROOT, options

KILLED = -9  # exit code
NEVER = 0  # as number of the call that fails
SIGKILL = -1  # as errno: kill the process at that call


@dataclass
class Result:
    """Exit code, duration and output of a command."""

    exit_code: int
    seconds: float
    output: str


class CommandServer:
    """Client of command_server.py, in a process whose disk can fail."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder = folder
        self.environment = {
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "MPLBACKEND": "agg",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "helpers" / "command_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | self.environment,
            cwd=folder,
        )
        assert self.answer() == "ready"

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(self, volumes: Path, *arguments: str, **faults: object) -> Result:
        """Run a command. `kill_after`: seconds; `fault`: arguments of fault_arm; `poison`: arguments of poison_data."""
        log = self.folder / "log"
        request: dict[str, Any] = {
            "environment": {"GPT2BOX_VOLUMES": str(volumes)},
            "folder": str(self.folder),
            "outputs": [str(log)] * 2,
            "arguments": arguments,
            **faults,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.answer()
        return Result(answer["code"], answer["seconds"], log.read_text(errors="replace"))

    def train(self, volumes: Path, settings: dict[str, Any], **faults: object) -> Result:
        return self.run(volumes, "train", *options(**settings), **faults)


def volumes_with_data(prepared: Path, folder: Path) -> Path:
    """Make volumes that share the prepared datasets."""
    folder.mkdir(parents=True)
    (folder / "data").symlink_to(prepared / "data")
    return folder


def hash_outputs(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file with tensors or tokens."""
    suffixes = (".safetensors", ".bin", ".gguf", ".pt")
    return {path.name: sha256_of(path) for path in sorted(folder.rglob("*")) if path.name.endswith(suffixes)}


def leftovers(folder: Path) -> list[Path]:
    """List temporary and retired files, which only an interrupted command leaves."""
    return [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".old"))]
