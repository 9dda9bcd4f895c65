"""A server of processes that can be killed, and a disk that can fail."""

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

KILLED = -9


NEVER = 0  # the call at which the disk fails


DEATH = -1  # in place of an errno


@dataclass
class Ended:
    """How a command went."""

    code: int
    seconds: float
    said: str


class Server:
    """See command_server.py."""

    def __init__(self, folder: Path, shim: Path) -> None:
        self.folder = folder
        self.environment = {
            "LD_PRELOAD": str(shim),
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

    def run(self, volumes: Path, *arguments: str, **more: object) -> Ended:
        """`kill_after` seconds; `fault`: folder, number of the call, errno, whether it stays, file for the calls."""
        log = self.folder / "log"
        request: dict[str, Any] = {
            "environment": {"GPT2BOX_VOLUMES": str(volumes)},
            "folder": str(self.folder),
            "outputs": [str(log)] * 2,
            "arguments": arguments,
            **more,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Ended(**self.answer(), said=log.read_text(errors="replace"))

    def train(self, volumes: Path, settings: dict[str, Any], **more: object) -> Ended:
        return self.run(volumes, "train", *options(**settings), **more)


def with_data(prepared: Path, folder: Path) -> Path:
    """Volumes with those datasets, for reading."""
    folder.mkdir(parents=True)
    (folder / "data").symlink_to(prepared / "data")
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Of the files that hold tensors, tokens or texts."""
    kinds = (".safetensors", ".bin", ".gguf", ".pt")
    return {path.name: sha256_of(path) for path in sorted(folder.rglob("*")) if path.name.endswith(kinds)}


def half_made(folder: Path) -> list[Path]:
    """What only an unfinished act leaves."""
    return [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".old"))]
