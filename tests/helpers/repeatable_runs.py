"""Short runs that are compared bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gpt2box.runs import metrics
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.settings import TINY

REPEATABLE_RUN = {"max_steps": 20, "save_interval": 5, "eval_interval": 10, "dropout": 0.1, "log_interval": 5}


def train(name: str = "run", allow: tuple[str, ...] = (), **changes: object) -> None:
    """Train in this process with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values = {key: str(value) for key, value in {**TINY, **REPEATABLE_RUN, "name": name, **changes}.items()}
        run_job(None, values, StopRequest(), allow)
    finally:
        torch.set_num_threads(threads)


def state(volumes: Path, name: str, step: int) -> dict[str, object]:
    """Read state.json of a run's checkpoint."""
    content = json.loads((volumes / "runs" / name / f"checkpoints/step-{step:08d}/state.json").read_text())
    return dict(content)


def digests(volumes: Path, name: str) -> dict[int, str]:
    """Read the fingerprints in a run's metrics.jsonl, by step."""
    rows = metrics.read_rows(volumes / "runs" / name / "metrics.jsonl")
    return {row["step"]: row["digest"] for row in rows if row["kind"] == "train"}
