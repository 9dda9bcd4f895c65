"""The choice among execution plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt2box.config import loader
from gpt2box.errors import MachineCannot
from gpt2box.model.shape import ModelShape
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.gpu_specs import GPU_SPECS
from gpt2box.planner.memory import GIB
from gpt2box.planner.search import choose_execution_plan, list_execution_plans
from gpt2box.planner.target_device import TargetDevice
from tests.helpers.commands import Command
from tests.helpers.plans import shape_of
from tests.helpers.settings import options as tiny


def gpu(free_gib: float, name: str = "rtx-4070", dtype: str = "bfloat16", compiled: bool = False) -> TargetDevice:
    return TargetDevice("a card", round(free_gib * GIB), GPU_SPECS[name], dtype, on_gpu=True, compiled=compiled)


def choose(device: TargetDevice, shape: ModelShape | None = None, **flags: str) -> ExecutionPlan:
    loaded = loader.load_config("openwebtext-adamw", flags)[0]
    shape = shape or shape_of("gpt2-medium")
    return choose_execution_plan(list_execution_plans(loaded, shape, device), loaded, shape, device)


def test_the_fastest_plan_that_fits_is_chosen_with_the_same_tokens_per_step() -> None:
    last = 0.0
    for free in (6.8, 7, 8, 10, 11.3, 16, 24, 80):
        chosen = choose(gpu(free))
        assert chosen.memory.total <= free * GIB and chosen.micro_batch_size * chosen.grad_accum_steps * 1024 == 65_536
        assert chosen.tokens_per_sec >= last
        last = chosen.tokens_per_sec


@pytest.mark.parametrize(
    ("config", "gib", "at_least"),
    [
        ("finetune", 7.5, 2),  # an 8 GB card, with the settings that keep the numbers
        ("finetune", 11.5, 4),
        ("finetune-large", 11.5, 4),
        ("finetune-xl", 11.5, 4),
        ("finetune-lora", 7.5, 1),
    ],
)
def test_every_published_size_fits_twelve_gib(config: str, gib: float, at_least: int) -> None:
    loaded = loader.load_config(config, {"dataset": "x"})[0]
    shape = shape_of(loaded.init_from)
    device = gpu(gib, compiled=True)
    assert (
        choose_execution_plan(list_execution_plans(loaded, shape, device), loaded, shape, device).micro_batch_size
        >= at_least
    )


def test_if_nothing_fits_the_error_names_settings_that_do() -> None:
    with pytest.raises(MachineCannot, match=r"--optimizer-states int8( --compile false)? fits .*changes the numbers"):
        choose(gpu(5.0))
    with pytest.raises(MachineCannot, match=r"--micro-batch-size auto --activation-checkpointing auto fits"):
        choose(gpu(12), micro_batch_size="32", activation_checkpointing="none")
    flags = {"optimizer_states": "int8", "optimizer_in_backward": "true", "weights_dtype": "bfloat16"}
    assert choose(gpu(3.5), **flags).micro_batch_size >= 1  # Medium on a card of 4 GB


def test_compiled_plans_need_more_memory_and_exclude_selective_checkpointing() -> None:
    loaded = loader.load_config("openwebtext-adamw", {})[0]
    shape = shape_of("gpt2-medium")
    compiled = list_execution_plans(loaded, shape, gpu(12, compiled=True))
    eager = list_execution_plans(loaded, shape, gpu(12))
    plain = {(plan.micro_batch_size, plan.activation_checkpointing): plan.memory.total for plan in eager}
    assert {plan.activation_checkpointing for plan in compiled} == {"none", "full"}
    assert all(
        chosen.memory.total > plain[chosen.micro_batch_size, chosen.activation_checkpointing] for chosen in compiled
    )


def test_a_gpu_without_bfloat16_still_gets_a_large_micro_batch() -> None:
    chosen = choose(gpu(15, "t4", "float32", compiled=True), shape_of("gpt2"))
    assert chosen.micro_batch_size >= 4 and chosen.tokens_per_sec == 0


def test_explicit_settings_are_obeyed_or_refused_with_the_nearest_plan() -> None:
    chosen = choose(gpu(12), micro_batch_size="2", activation_checkpointing="full")
    assert (chosen.micro_batch_size, chosen.activation_checkpointing) == (2, "full")
    with pytest.raises(MachineCannot, match="micro_batch_size 32, activation_checkpointing none"):
        choose(gpu(12), micro_batch_size="32", activation_checkpointing="none")
    with pytest.raises(MachineCannot, match=r"needs? is 6\.\d GiB \(micro_batch_size 1, activation_checkpointing full"):
        choose(gpu(4))


def test_a_resumed_run_keeps_its_execution_plan(gpt2box: Command, volumes: Path) -> None:
    settings = tiny(name="run", micro_batch_size="auto", max_steps=4, activation_checkpointing="auto")
    assert gpt2box("train", *settings).returncode == 0
    path = volumes / "runs" / "run" / "plan.json"
    plan = json.loads(path.read_text())
    assert (plan["micro_batch_size"], plan["activation_checkpointing"]) == (4, "none") and plan["memory"]["weights"]
    path.write_text(json.dumps(plan | {"micro_batch_size": 2, "activation_checkpointing": "selective"}))
    assert gpt2box("train", *[s.replace("max-steps=4", "max-steps=6") for s in settings]).returncode == 0
    again = json.loads(path.read_text())
    assert (again["micro_batch_size"], again["activation_checkpointing"]) == (2, "selective")


def test_a_plan_that_cannot_fit_is_refused_before_anything_is_loaded(gpt2box: Command, volumes: Path) -> None:
    done = gpt2box("train", *tiny(name="run", n_layer=400, n_embd=20_000, activation_checkpointing="full"))
    assert done.returncode == 3 and "the least that these settings need" in done.stderr
    assert not (volumes / "runs" / "run").exists()


def test_muon_needs_less_memory_slightly_more_time_and_smaller_checkpoints() -> None:
    shape, device = shape_of("gpt2-medium"), gpu(12)
    plans = {}
    for optimizer in ("adamw", "muon"):
        loaded = loader.load_config("openwebtext", {"optimizer": optimizer, "micro_batch_size": "4"})[0]
        (plans[optimizer],) = (
            w for w in list_execution_plans(loaded, shape, device) if w.activation_checkpointing == "full"
        )
    inside = 12 * 24 * 1024**2
    assert plans["adamw"].memory.optimizer - plans["muon"].memory.optimizer == 4 * inside
    assert 0.9 < plans["muon"].tokens_per_sec / plans["adamw"].tokens_per_sec < 1
    sizes = [shape.checkpoint_bytes("float32", optimizer, "float32") for optimizer in ("adamw", "muon")]
    assert sizes[0] - sizes[1] == 4 * inside


def test_if_muon_does_not_fit_the_suggested_settings_keep_it() -> None:
    loaded, shape, device = loader.load_config("openwebtext", {})[0], shape_of("gpt2-medium"), gpu(3.8)
    with pytest.raises(MachineCannot, match="--optimizer-states int8 --weights-dtype bfloat16 fits"):
        choose_execution_plan(list_execution_plans(loaded, shape, device), loaded, shape, device)
