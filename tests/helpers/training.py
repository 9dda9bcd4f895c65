"""Train a tiny run in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.settings import ROOT, TINY, options


def train(name: str = "run", **changes: object) -> None:
    """Train in this process."""
    values = {key: str(value) for key, value in {**TINY, "name": name, **changes}.items()}
    run_job(None, values, StopRequest())


def process(volumes: Path, program: str = "", **changes: object) -> subprocess.Popen[str]:
    """Start a training process with one thread, as the runs it is compared with have."""
    command = [sys.executable, *([program] if program else ["-m", "gpt2box"]), "train", *options(**changes)]
    paths = {"GPT2BOX_VOLUMES": str(volumes), "PYTHONPATH": str(ROOT)}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | paths
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(path: Path, running: subprocess.Popen[str]) -> None:
    """Wait until the file exists while the process runs."""
    while not path.exists():
        assert running.poll() is None, running.stderr and running.stderr.read()
        time.sleep(0.005)
