"""The summary of a run."""

from __future__ import annotations

from gpt2box.runs.view import training_seconds_after


def test_training_time_after_the_checkpoint_is_counted() -> None:
    rows = [{"kind": "train", "step": step, "tokens_per_sec": 50.0} for step in (10, 20, 30)]
    assert training_seconds_after(rows, 10, 100) == 40 and training_seconds_after(rows, 30, 100) == 0
    assert training_seconds_after([{"kind": "train", "step": 40, "tokens_per_sec": None}], 30, 100) == 0
