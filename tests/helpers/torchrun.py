"""Start ranks with torchrun, and compare the metrics of runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2box.runs import metrics
from tests.helpers.settings import TINY, options

SAME = {**TINY, "lr_schedule": "constant", "warmup_steps": 0, "log_interval": 1}


LONG = {**SAME, "max_steps": 300, "save_interval": 50, "eval_interval": 150}


def two_ranks(*program: str, restarts: int = 0) -> subprocess.Popen[str]:
    launch = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def train_on_two(name: str, restarts: int = 0, **settings: object) -> subprocess.Popen[str]:
    return two_ranks("-m", "gpt2box", "train", *options(name=name, **settings), restarts=restarts)


def rank_of(launcher: subprocess.Popen[str], rank: int) -> int:
    """Return a rank's process id."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (found,) = [c for c in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{c}/environ").read_bytes()]
    return int(found)


def rows(volumes: Path, name: str, key: str) -> dict[int, float]:
    lines: list[dict[str, Any]] = metrics.read_rows(volumes / "runs" / name / "metrics.jsonl")
    return {row["step"]: row[key] for row in lines if key in row}


def assert_same(volumes: Path, name: str, other: str, besides: tuple[int, ...] = (), norm: float = 1e-5) -> None:
    """Assert that two runs logged equal losses and gradient norms at the same steps.

    `besides`: steps at which only `name` was evaluated. `norm`: tolerance for the gradient norms.
    """
    for key in ("loss", "val_loss", "grad_norm"):
        found = {s: x for s, x in rows(volumes, name, key).items() if key != "val_loss" or s not in besides}
        assert found == pytest.approx(rows(volumes, other, key), abs=norm if key == "grad_norm" else 1e-5), key
