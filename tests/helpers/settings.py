"""Settings of a seconds-long training run, and where the checkout's files are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TINYSHAKESPEARE = ROOT / "tests" / "data_files" / "tinyshakespeare.txt"

# Settings of a run that takes seconds; tests override some of them.
TINY = {
    "dataset": "text",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "micro_batch_size": 4,
    "tokens_per_step": 256,
    "max_steps": 20,
    "learning_rate": 1e-3,
    "eval_interval": 10,
    "eval_windows": 8,
    "log_interval": 5,
    "device": "cpu",
    "keep_last": 100,
}


def options(**changes: object) -> list[str]:
    """Return a tiny run's settings as command-line options."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in {**TINY, **changes}.items()]
