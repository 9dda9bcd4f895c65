"""Run folders as training leaves them."""

from __future__ import annotations

import json
from pathlib import Path


def train_line(step: int, **changes: object) -> str:
    """Return a train row of metrics.jsonl."""
    row = {
        "step": step, "kind": "train", "loss": 4 - step / 1000, "learning_rate": 1e-3, "grad_norm": 0.5,
        "tokens_per_sec": 5000.0, "peak_memory_bytes": 2**30, "skipped_steps": 0, "mfu": None, "time": 1e9 + step,
    }  # fmt: skip
    return json.dumps({**row, **changes}) + "\n"


def eval_line(step: int, val_loss: float) -> str:
    """Return an eval row of metrics.jsonl."""
    return (
        json.dumps({"step": step, "kind": "eval", "val_loss": val_loss, "val_set": "v", "best": True, "time": 1e9})
        + "\n"
    )


def make_run_folder(runs: Path, name: str, steps: int) -> Path:
    """Write a run's folder as half of a training leaves it, without checkpoints."""
    folder = runs / name
    (folder / "samples").mkdir(parents=True)
    (folder / "plan.json").write_text('{"max_steps": 100000, "tokens_per_step": 64}')
    (folder / "config.yaml").write_text("dataset: text\n")
    (folder / ".lock").touch()
    (folder / "log.txt").write_text("2026-01-01 00:00:00  it began\n")
    (folder / "metrics.jsonl").write_text(eval_line(0, 4.5) + "".join(train_line(step) for step in range(1, steps + 1)))
    return folder
