"""plan.json is read alike whether its values lie flat or in sections."""

from __future__ import annotations

import json
from pathlib import Path

from gpt2box.runs.plan_file import read_plan

FLAT = {"max_steps": 100, "tokens_per_step": 64, "micro_batch_size": 4, "shape": {"n_layer": 2}}


def test_flat_and_sectioned_plans_have_the_same_values(tmp_path: Path) -> None:
    sectioned = {
        "config": {"max_steps": 100, "tokens_per_step": 64, "micro_batch_size": "auto"},
        "execution": {"micro_batch_size": 4},
        "derived": {"shape": {"n_layer": 2}},
    }
    for content in (FLAT, sectioned, {**FLAT, "config": sectioned["config"]}):
        (tmp_path / "plan.json").write_text(json.dumps(content))
        assert read_plan(tmp_path) == FLAT


def test_a_damaged_plan_has_no_values(tmp_path: Path) -> None:
    for content in ("", "[]", '{"max_st'):
        (tmp_path / "plan.json").write_text(content)
        assert read_plan(tmp_path) == {}
