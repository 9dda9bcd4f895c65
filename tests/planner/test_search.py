"""The plan against a simulation of the very program, the choice among plans, and `gpt2box plan`."""

from __future__ import annotations

import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

from gpt2box.config import loader
from gpt2box.errors import MachineCannot
from gpt2box.model.selective_recompute import linear
from gpt2box.model.shape import ModelShape
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.gpu_specs import GPU_SPECS, gpu_spec_named, gpu_spec_of_device
from gpt2box.planner.memory import CUBLAS_WORKSPACE_BYTES, DETERMINISTIC_WORKSPACE_BYTES, GIB, WORKSPACE_COUNT
from gpt2box.planner.search import choose_execution_plan, list_execution_plans
from gpt2box.planner.target_device import TargetDevice
from gpt2box.system.determinism import WORKSPACE
from tests.helpers.commands import Command
from tests.helpers.memory_simulator import simulate
from tests.helpers.plans import planned, shape_of
from tests.helpers.settings import options as tiny

NANOGPT_4X1024 = 11.66  # GiB that nanoGPT's own step takes for GPT-2 Medium, by the same kind of simulation


LORA = {"init_from": "x", "lora_rank": 16, "weights_dtype": "bfloat16"}
MUON = {"optimizer": "muon"}
LEAN = {"optimizer_states": "int8", "weights_dtype": "bfloat16", "optimizer_in_backward": True}


@pytest.mark.parametrize(
    ("shape", "micro_batch_size", "mode", "dtype", "settings"),
    [
        (shape_of("gpt2"), 4, "none", "bfloat16", {}),
        (shape_of("gpt2"), 16, "full", "bfloat16", {"accumulation": 1}),
        (shape_of("gpt2-medium"), 4, "none", "bfloat16", {"dropout": 0.2}),
        (shape_of("gpt2-medium"), 8, "selective", "bfloat16", {}),
        (shape_of("gpt2-medium"), 36, "full", "bfloat16", {}),
        (shape_of("gpt2-medium", 512), 1, "full", "bfloat16", {"accumulation": 1}),
        (shape_of("gpt2-large"), 1, "selective", "bfloat16", {"loss_chunk_tokens": 128}),
        (ModelShape(6, 10, 640, 256, 50_257, bias=False), 3, "none", "float32", {"dropout": 0.1}),
        (ModelShape(5, 7, 448, 2048, 20_000), 4, "selective", "float32", {"accumulation": 1}),
        (ModelShape(9, 12, 768, 384, 65), 24, "full", "float32", {"dropout": 0.1}),
        (ModelShape(7, 16, 1024, 512, 300), 16, "selective", "bfloat16", {"loss_chunk_tokens": 2048}),
        (shape_of("gpt2-medium"), 4, "none", "bfloat16", {"optimizer_in_backward": True, "accumulation": 1}),
        # Medium, Large and XL with fewer layers: the simulation goes through every chunk of every update.
        (ModelShape(4, 16, 1024, 1024, 50_257), 1, "full", "bfloat16", LEAN),
        (ModelShape(4, 20, 1280, 1024, 50_257), 4, "full", "bfloat16", {"optimizer_states": "int8"}),
        (ModelShape(3, 25, 1600, 1024, 50_257), 8, "full", "bfloat16", LEAN),
        (ModelShape(6, 10, 640, 256, 50_257, bias=False), 3, "none", "float32", {"weights_dtype": "bfloat16"}),
        (ModelShape(12, 20, 1280, 1024, 50_257), 4, "none", "bfloat16", LORA),
        (ModelShape(12, 25, 1600, 1024, 50_257), 16, "full", "bfloat16", {**LORA, "lora_rank": 64, "dropout": 0.1}),
        (shape_of("gpt2-medium"), 2, "none", "bfloat16", {**LORA, "weights_dtype": "float32"}),
        (ModelShape(9, 12, 768, 384, 65), 16, "none", "float32", {**LORA, "weights_dtype": "float32"}),
        (ModelShape(9, 12, 768, 384, 65), 16, "full", "float32", {**LORA, "accumulation": 1}),
        (shape_of("gpt2-medium"), 4, "none", "bfloat16", MUON),
        (ModelShape(4, 16, 1024, 256, 65), 1, "full", "bfloat16", MUON),  # where a matrix's update takes most
        (ModelShape(4, 16, 1024, 256, 65), 1, "full", "float32", {**MUON, "optimizer_states": "int8"}),
        (ModelShape(4, 25, 1600, 64, 65), 1, "full", "bfloat16", {**MUON, **LEAN, "optimizer_in_backward": False}),
    ],
)
def test_planned_bytes_are_the_simulated_ones(
    shape: ModelShape, micro_batch_size: int, mode: str, dtype: str, settings: dict[str, object]
) -> None:
    plan, way = planned(shape, micro_batch_size, mode, dtype, **settings)
    simulated = simulate(plan)
    assert 1.0 <= way.memory.allocated / simulated.allocated <= 1.05
    # Where gradients are not kept, little is taken and given back again and the margin is not used.
    assert 0.94 <= way.memory.reserved / simulated.reserved <= (1.3 if "optimizer_in_backward" in settings else 1.12)


SPLIT = {"shard": True}


@pytest.mark.skipif(torch.__version__ < "2.6", reason="FSDP2 is not public before PyTorch 2.6")
@pytest.mark.parametrize(
    ("ranks", "shape", "micro_batch_size", "mode", "dtype", "settings"),
    [
        (2, ModelShape(8, 16, 1024, 1024, 50_257), 8, "full", "bfloat16", SPLIT),
        (4, ModelShape(8, 25, 1600, 1024, 50_257), 1, "full", "bfloat16", SPLIT),
        (4, ModelShape(8, 25, 1600, 1024, 50_257), 2, "none", "bfloat16", {**SPLIT, **MUON}),
        (4, ModelShape(8, 25, 1600, 1024, 65), 1, "full", "bfloat16", {**SPLIT, "optimizer_states": "int8"}),
        (8, ModelShape(6, 10, 640, 256, 50_257, bias=False), 3, "selective", "float32", {**SPLIT, "dropout": 0.1}),
        (8, ModelShape(9, 12, 768, 384, 65), 16, "full", "float32", SPLIT),
    ],
)
def test_planned_bytes_of_a_share_are_the_simulated_ones(
    ranks: int, shape: ModelShape, micro_batch_size: int, mode: str, dtype: str, settings: dict[str, object]
) -> None:
    plan, way = planned(shape, micro_batch_size, mode, dtype, ranks=ranks, **settings)
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        simulated = apart.submit(simulate, plan).result()
    assert 1.0 <= way.memory.allocated / simulated.allocated <= 1.13  # most where there are few layers
    assert 0.97 <= way.memory.reserved / simulated.reserved <= 1.15
    alone = planned(shape, micro_batch_size, mode, dtype, **{**settings, "shard": False})[1].memory
    share = sum(simulated.at_peak[kind] for kind in ("weights", "gradients", "optimizer"))
    assert share == pytest.approx((2 * alone.weights + alone.optimizer) / ranks, rel=0.01)


def test_fake_tensors_allocate_what_real_ones_do() -> None:
    plan, _ = planned(ModelShape(2, 4, 128, 64, 1000), 4, "none", "float32")
    with_data, without = simulate(plan, real=True), simulate(plan)
    # The CPU's attention keeps what flash attention keeps; layer norms and masks are alike in float32.
    assert abs(with_data.allocated / without.allocated - 1) < 0.03


@pytest.mark.parametrize(("mode", "share"), [("none", 0.8), ("selective", 0.7), ("full", 0.54)])
def test_medium_takes_a_part_of_what_nanogpt_takes(mode: str, share: float) -> None:
    plan, _ = planned(shape_of("gpt2-medium"), 4, mode, "bfloat16")
    assert simulate(plan).allocated / GIB <= share * NANOGPT_4X1024


def test_a_cast_linear_layer_has_the_plain_ones_gradients() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40), torch.randn(3, 5, 24)
    grads = []
    for function in (layer, lambda y: linear(y, layer)):
        layer.zero_grad()
        source = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = function(source)
        out.float().square().sum().backward()
        assert source.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
        grads.append([out.detach(), source.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    for plain, cast in zip(*grads, strict=True):
        torch.testing.assert_close(cast, plain, rtol=0.01, atol=0.02)


def card(free_gib: float, name: str = "rtx-4070", dtype: str = "bfloat16", compiled: bool = False) -> TargetDevice:
    return TargetDevice("a card", round(free_gib * GIB), GPU_SPECS[name], dtype, on_gpu=True, compiled=compiled)


def chosen(place: TargetDevice, shape: ModelShape | None = None, **flags: str) -> ExecutionPlan:
    loaded = loader.load_config("openwebtext-adamw", flags)[0]
    shape = shape or shape_of("gpt2-medium")
    return choose_execution_plan(list_execution_plans(loaded, shape, place), loaded, shape, place)


def test_the_fastest_plan_that_fits_is_chosen_and_the_step_stays_the_same() -> None:
    last = 0.0
    for free in (6.8, 7, 8, 10, 11.3, 16, 24, 80):
        way = chosen(card(free))
        assert way.memory.total <= free * GIB and way.micro_batch_size * way.grad_accum_steps * 1024 == 65_536
        assert way.tokens_per_sec >= last
        last = way.tokens_per_sec


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
    place = card(gib, compiled=True)
    assert (
        choose_execution_plan(list_execution_plans(loaded, shape, place), loaded, shape, place).micro_batch_size
        >= at_least
    )


def test_where_nothing_fits_it_says_which_settings_would() -> None:
    with pytest.raises(MachineCannot, match=r"--optimizer-states int8( --compile false)? fits .*changes the numbers"):
        chosen(card(5.0))
    with pytest.raises(MachineCannot, match=r"--micro-batch-size auto --activation-checkpointing auto fits"):
        chosen(card(12), micro_batch_size="32", activation_checkpointing="none")
    flags = {"optimizer_states": "int8", "optimizer_in_backward": "true", "weights_dtype": "bfloat16"}
    assert chosen(card(3.5), **flags).micro_batch_size >= 1  # Medium on a card of 4 GB


def test_compiled_plans_count_what_the_compiler_keeps_and_leave_selective_out() -> None:
    loaded = loader.load_config("openwebtext-adamw", {})[0]
    shape = shape_of("gpt2-medium")
    compiled = list_execution_plans(loaded, shape, card(12, compiled=True))
    eager = list_execution_plans(loaded, shape, card(12))
    plain = {(way.micro_batch_size, way.activation_checkpointing): way.memory.total for way in eager}
    assert {way.activation_checkpointing for way in compiled} == {"none", "full"}
    assert all(way.memory.total > plain[way.micro_batch_size, way.activation_checkpointing] for way in compiled)


def test_a_deterministic_plan_counts_cublas_workspaces() -> None:
    kibibytes, buffers = (int(number) for number in WORKSPACE.removeprefix(":").split(":"))  # as cuBLAS reads it
    assert kibibytes * 1024 * buffers == DETERMINISTIC_WORKSPACE_BYTES
    plain, fixed = (
        planned(shape_of("gpt2"), 4, "none", "bfloat16", deterministic=value)[1].memory for value in ("auto", "true")
    )
    assert fixed == replace(
        plain, workspace=plain.workspace - CUBLAS_WORKSPACE_BYTES + WORKSPACE_COUNT * DETERMINISTIC_WORKSPACE_BYTES
    )


def test_a_card_without_bfloat16_still_gets_a_large_micro_batch() -> None:
    way = chosen(card(15, "t4", "float32", compiled=True), shape_of("gpt2"))
    assert way.micro_batch_size >= 4 and way.tokens_per_sec == 0


def test_settings_that_are_given_are_obeyed_or_refused_with_the_nearest() -> None:
    way = chosen(card(12), micro_batch_size="2", activation_checkpointing="full")
    assert (way.micro_batch_size, way.activation_checkpointing) == (2, "full")
    with pytest.raises(MachineCannot, match="micro_batch_size 32, activation_checkpointing none"):
        chosen(card(12), micro_batch_size="32", activation_checkpointing="none")
    with pytest.raises(MachineCannot, match=r"needs? is 6\.\d GiB \(micro_batch_size 1, activation_checkpointing full"):
        chosen(card(4))


def test_cards_are_known_by_the_names_that_drivers_and_people_use() -> None:
    for name, kind in {
        "NVIDIA GeForce RTX 4070": "rtx-4070",
        "NVIDIA GeForce RTX 4070 Ti SUPER": "rtx-4070-ti-super",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA H100 80GB HBM3": "h100",
        "Tesla T4": "t4",
    }.items():
        found = gpu_spec_of_device(name, None)
        assert found and found.name == kind
    assert (
        gpu_spec_of_device("NVIDIA GeForce RTX 4070 Laptop GPU", 8 * GIB) is None
        and gpu_spec_of_device("Matrox G400", None) is None
    )
    assert (
        gpu_spec_of_device("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5 * GIB) is None
        and gpu_spec_of_device("NVIDIA H100 NVL", 94 * GIB) is None
    )
    sixteen = gpu_spec_of_device("NVIDIA GeForce RTX 4060 Ti", 16 * GIB)
    assert sixteen and sixteen.name == "rtx-4060-ti-16gb"
    assert gpu_spec_named("RTX4070").gib == 12


def test_plan_prints_and_hands_out_the_same_figures(gpt2box: Command, volumes: Path) -> None:
    text = gpt2box("plan", "shakespeare", "--gpu", "rtx-4070", "--explain")
    data = json.loads(gpt2box("plan", "shakespeare", "--gpu", "rtx-4070", "--json").stdout)
    assert text.returncode == 0 and "estimated" in text.stdout
    assert f"{data['chosen']['tokens_per_sec']:,.0f} tokens/s" in text.stdout and data["kind"] == "estimated"
    assert data["chosen"]["memory"]["total"] == sum(v for k, v in data["chosen"]["memory"].items() if k != "total")
    here = gpt2box("plan", "demo")
    assert here.returncode == 0 and "on this CPU" in here.stdout
    table = gpt2box("plan", "shakespeare", "--vram-gib", "12", "--all-sizes")
    assert table.returncode == 0 and "gpt2-xl" in table.stdout and "does not fit" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["shakespeare", "--gpu", "rtx-4071"], 2, "did you mean rtx-407"),
        (["shakespeare", "--vram-gib", "nan"], 2, "is not a number"),
        (["shakespeare", "--vram-gib", "3"], 3, "the least that these settings need"),
        (["shakespeare", "--gpu", "rtx-4070", "--micro-batch-size", "0"], 2, "expected [auto|N ≥ 1]"),
        (["nothing.yaml", "--gpu", "rtx-4070"], 2, "no file"),
        (["shakespeare"], 2, "--gpu rtx-4070"),
        (["finetune", "--gpu", "rtx-4070", "--block-size", "2048"], 2, "allow at most 1024"),
        (["finetune", "--gpu", "rtx-4070", "--compile=true", "--optimizer-in-backward=true"], 2, "compile: found true"),
        (["shakespeare", "--vram-gib", "1e300"], 2, "--vram-gib"),
    ],
)
def test_nonsense_is_answered(gpt2box: Command, volumes: Path, arguments: list[str], code: int, part: str) -> None:
    done = gpt2box("plan", *arguments)
    assert done.returncode == code and part in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_training_keeps_to_its_way_when_it_goes_on(gpt2box: Command, volumes: Path) -> None:
    settings = tiny(name="run", micro_batch_size="auto", max_steps=4, activation_checkpointing="auto")
    assert gpt2box("train", *settings).returncode == 0
    path = volumes / "runs" / "run" / "plan.json"
    plan = json.loads(path.read_text())
    assert (plan["micro_batch_size"], plan["activation_checkpointing"]) == (4, "none") and plan["memory"]["weights"]
    path.write_text(json.dumps(plan | {"micro_batch_size": 2, "activation_checkpointing": "selective"}))
    assert gpt2box("train", *[s.replace("max-steps=4", "max-steps=6") for s in settings]).returncode == 0
    again = json.loads(path.read_text())
    assert (again["micro_batch_size"], again["activation_checkpointing"]) == (2, "selective")


def test_what_cannot_fit_is_said_before_anything_is_loaded(gpt2box: Command, volumes: Path) -> None:
    done = gpt2box("train", *tiny(name="run", n_layer=400, n_embd=20_000, activation_checkpointing="full"))
    assert done.returncode == 3 and "the least that these settings need" in done.stderr
    assert not (volumes / "runs" / "run").exists()


def test_muon_takes_less_memory_a_little_more_time_and_smaller_checkpoints() -> None:
    shape, place = shape_of("gpt2-medium"), card(12)
    ways = {}
    for optimizer in ("adamw", "muon"):
        loaded = loader.load_config("openwebtext", {"optimizer": optimizer, "micro_batch_size": "4"})[0]
        (ways[optimizer],) = (
            w for w in list_execution_plans(loaded, shape, place) if w.activation_checkpointing == "full"
        )
    inside = 12 * 24 * 1024**2
    assert ways["adamw"].memory.optimizer - ways["muon"].memory.optimizer == 4 * inside
    assert 0.9 < ways["muon"].tokens_per_sec / ways["adamw"].tokens_per_sec < 1
    sizes = [shape.checkpoint_bytes("float32", optimizer, "float32") for optimizer in ("adamw", "muon")]
    assert sizes[0] - sizes[1] == 4 * inside


def test_where_muon_does_not_fit_what_is_offered_keeps_it() -> None:
    loaded, shape, place = loader.load_config("openwebtext", {})[0], shape_of("gpt2-medium"), card(3.8)
    with pytest.raises(MachineCannot, match="--optimizer-states int8 --weights-dtype bfloat16 fits"):
        choose_execution_plan(list_execution_plans(loaded, shape, place), loaded, shape, place)


@pytest.mark.parametrize("name", ["4070", "RTX 4070", "geforce rtx-4070", "4070-TI"])
def test_a_card_is_known_without_its_family(name: str) -> None:
    assert gpu_spec_named(name).name == ("rtx-4070-ti" if "TI" in name else "rtx-4070")


def test_the_other_ways_are_shown_fastest_first_as_exactly_as_they_fit(gpt2box: Command) -> None:
    done = gpt2box("plan", "finetune-xl", "--gpu", "rtx-4070")
    ways = [line for line in done.stdout.splitlines() if line.startswith(("  none ", "  selective ", "  full "))]
    paces = [float(way.split("GiB")[1].split()[0].replace(",", "")) for way in ways]
    assert len(ways) == 3 and paces == sorted(paces, reverse=True), ways
    assert "of 11.50 GiB free" in done.stdout and all(re.search(r"\d\.\d\d GiB", way) for way in ways)
    wrong = gpt2box("plan", "finetune", "--gpu", "nope")
    assert wrong.returncode == 2 and max(map(len, wrong.stderr.splitlines())) <= 120
