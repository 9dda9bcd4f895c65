"""Curves are read completely and fast, and downsampling keeps their extremes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gpt2box.runs.history import CurveBuffer, read_history
from tests.helpers.run_folders import eval_line, train_line


def test_pyarrow_and_the_row_by_row_reader_give_equal_curves(tmp_path: Path) -> None:
    lines = [train_line(step) + (eval_line(step, 3.0) if step % 7 == 0 else "") for step in range(1, 9001)]
    lines[100] = train_line(101, loss=None)
    for text in (
        "".join(lines),
        "".join([*lines[:50], '{"step": 5, "ki\n', train_line(51, loss=float("nan")), *lines[51:]]),
    ):
        assert len(text) > 1 << 20
        (tmp_path / "metrics.jsonl").write_text(text)
        fast, slow = read_history(tmp_path / "metrics.jsonl"), CurveBuffer()
        slow._add_row_by_row(text.encode())
        other = slow.to_history()
        assert (fast.rows, fast.non_finite, fast.val_sets) == (other.rows, other.non_finite, other.val_sets)
        assert fast.curves.keys() == other.curves.keys() and len(fast.curves["val_loss"].step) == 9000 // 7
        for name, curve in fast.curves.items():
            assert curve.value.tolist() == other.curves[name].value.tolist()


def test_downsampling_keeps_extremes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as file:
        for step in range(1, 50_001):
            loss = 99.0 if step == 31_234 else -5.0 if step == 40_321 else 3.0
            file.write(json.dumps({"step": step, "kind": "train", "time": step, "loss": loss}) + "\n")
    curve = read_history(path).curves["loss"]
    thin = curve.downsampled(2000)
    assert len(curve.step) == 50_000 and len(thin.step) <= 2002
    assert (thin.step[0], thin.step[-1]) == (1, 50_000)
    assert {31_234.0, 40_321.0} <= set(thin.step.tolist()) and np.all(np.diff(thin.step) > 0)
