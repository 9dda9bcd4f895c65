"""plan.json: flat, with the keys that every version writes."""

import json
from pathlib import Path

import pytest

from gpt2box.runs.manifest import read_plan
from tests.helpers.optimizers import plan as make_plan

WRITTEN_BY_EVERY_VERSION = """
    shape dropout seed device dtype compile activation_checkpointing loss_chunk_tokens weights_dtype
    optimizer_states optimizer_in_backward lora_rank lora_alpha micro_batch_size grad_accum_steps ranks
    shard sequences_per_step tokens_per_step epochs max_steps optimizer learning_rate min_lr warmup_steps
    lr_schedule decay_steps decay_fraction weight_decay beta1 beta2 grad_clip spike_sigma eval_interval
    eval_windows eval_batch_size patience save_interval save_minutes keep_last log_interval parameters
    checkpoint_bytes memory expected_tokens_per_sec speed_measured peak_tflops log_format deterministic
    wandb
"""


def test_plan_json_has_resolved_values_under_the_keys_of_every_version(tmp_path: Path) -> None:
    plan = make_plan(micro_batch_size="4", max_steps="500")
    (tmp_path / "plan.json").write_text(json.dumps(plan.as_dict()))
    stored = read_plan(tmp_path)
    assert set(WRITTEN_BY_EVERY_VERSION.split()) <= stored.keys()
    assert stored["micro_batch_size"] == 4 and stored["compile"] is False and stored["deterministic"] is True
    assert stored["min_lr"] == pytest.approx(stored["learning_rate"] / 10) and stored["decay_steps"] == 500


@pytest.mark.parametrize("content", ["", "[]", '{"max_st'])
def test_a_damaged_plan_has_no_values(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    assert read_plan(tmp_path) == {}


def test_only_the_execution_plan_changes_after_an_out_of_memory_error() -> None:
    plan = make_plan(micro_batch_size="8", tokens_per_step="16384", block_size="1024")
    smaller = plan.with_execution(micro_batch_size=4, grad_accum_steps=4)
    assert (smaller.config, smaller.derived) == (plan.config, plan.derived)
    assert smaller.sequences_per_step == plan.sequences_per_step == 16
    assert smaller.as_dict()["micro_batch_size"] == 4 and plan.as_dict()["micro_batch_size"] == 8
