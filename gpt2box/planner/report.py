"""`gpt2box plan`: what fits a GPU, how fast, how long, and which other plans there are. Never imports torch."""

import json
from collections.abc import Iterator
from typing import Any

from gpt2box.config.schema import MODEL_SHAPES, Config
from gpt2box.data.dataset import open_dataset
from gpt2box.errors import Gpt2boxError, MachineCannot
from gpt2box.model.shape import GPT2_VOCAB_SIZE, ModelShape
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.memory import count_padded_parameters
from gpt2box.planner.model_shape import resolve_model_shape
from gpt2box.planner.search import (
    check_sharding,
    choose_execution_plan,
    find_fallbacks,
    first_fitting_plan,
    list_execution_plans,
)
from gpt2box.planner.target_device import TargetDevice, apply_bench_records
from gpt2box.utils.paths import dataset_dir
from gpt2box.utils.progress import format_bytes, format_duration, pluralize

ESTIMATE_NOTES = {False: "all estimated", True: "speed measured here by gpt2box bench, the rest estimated"}
SPEED_MARKS = {False: "", True: " (measured here)"}
MEMORY_FORMULAS = {
    "weights": "4 N: float32; weights_dtype bfloat16: 2 N",
    "gradients": "as the weights, allocated before the next micro-step begins; optimizer_in_backward: none",
    "optimizer": "8 N: AdamW's two moments; muon: 48 L C² less; optimizer_states int8: a quarter",
    "activations": "L × (M × (36 C + 16 + 4 H)), compiled 24 C² more; full checkpointing: 4 to 8 C, and a block",
    "loss": "4 P C + 2 P C for the output layer, 6 P × loss_chunk_tokens, 8 M C",
    "workspace": "cuBLAS, and small tensors",
    "margin": "fragmentation of PyTorch's allocator",
    "context": "the CUDA context",
}


def print_report(config: Config, device: TargetDevice, all_sizes: bool, explain: bool, as_json: bool) -> None:
    """Print the plan for a device, or the table of all published model sizes.

    Raises MachineCannot: nothing fits (not for the table).
    """
    if all_sizes:
        return print_size_table(config, device, as_json)
    shape = resolve_model_shape(config)
    check_sharding(config, shape, device.ranks)
    device = apply_bench_records(device, config, shape)
    plans = list_execution_plans(config, shape, device)
    try:
        chosen = choose_execution_plan(plans, config, shape, device)
    except MachineCannot:
        if as_json:
            print(json.dumps({"name": config.name, "card": device.name, "chosen": None}, indent=2))
        else:
            print("\n".join(format_alternatives(None, plans, device)))
        raise
    if as_json:
        print(json.dumps(report_as_dict(config, shape, device, chosen, plans), indent=2))
    else:
        print("\n".join(format_report(config, shape, device, chosen, plans, explain)))


def format_report(
    config: Config,
    shape: ModelShape,
    device: TargetDevice,
    chosen: ExecutionPlan,
    plans: list[ExecutionPlan],
    explain: bool,
) -> Iterator[str]:
    """Yield the report's lines."""
    gpus = f"{device.ranks} × {device.name}" if device.ranks > 1 else device.name
    notes = f"({device.memory_note}); {ESTIMATE_NOTES[chosen.measured]}"
    yield f"{config.name}: {shape.parameters:,} parameters, on {gpus} {notes}"
    for line in format_plan(config, shape, chosen, device.compiled and config.may_compile):
        yield f"  {line}"
    each = " of each GPU" if device.ranks > 1 else ""
    yield f"memory{each} at its peak, in {chosen.memory.peak_phase}; estimated"
    for name, count in chosen.memory.components().items():
        yield f"  {name:12} {format_bytes(count):>10}" + (f"   {MEMORY_FORMULAS[name]}" if explain else "")
    yield f"  {'total':12} {format_bytes(chosen.memory.total, 2):>10}   of {format_bytes(device.free_bytes, 2)} free"
    if chosen.measured_bytes:
        yield f"  {'measured':12} {format_bytes(chosen.measured_bytes):>10}   here, by gpt2box bench"
    if explain:
        M, N = chosen.micro_batch_size * shape.block_size, count_padded_parameters(shape)
        sizes = f"L = {shape.n_layer}, C = {shape.n_embd}, H = {shape.n_head}, P = {shape.padded_vocab_size:,}"
        yield f"  N = {N:,} parameters with padding, {sizes}, M = {M:,} tokens"
    yield "other plans for the same steps, fastest first"
    for line in format_alternatives(chosen, plans, device):
        yield f"  {line}"
    for fallback in find_fallbacks(config, shape, device) if device.on_gpu else ():
        plan, numbers = fallback.plan, "changes the numbers" if fallback.changes_numbers else "the same numbers"
        speed = f", {format_speed(plan)}" if plan.tokens_per_sec else ""
        yield f"  {fallback.flags}\n    {plan.describe()}, {format_bytes(plan.total_bytes)}{speed}; {numbers}"


def format_speed(plan: ExecutionPlan) -> str:
    """Format a plan's speed, marked if it was measured on this machine."""
    return f"{plan.tokens_per_sec:,.0f} tokens/s{SPEED_MARKS[plan.measured]}"


def format_plan(config: Config, shape: ModelShape, plan: ExecutionPlan, compiled: bool) -> Iterator[str]:
    """Yield lines on how a step is performed, how fast the run is and what it stores."""
    ranks = f" × {plan.ranks} GPUs" if plan.ranks > 1 else ""
    yield (
        f"{config.tokens_per_step:,} tokens a step = {plan.micro_batch_size} × {shape.block_size} × "
        f"{pluralize(plan.grad_accum_steps, 'micro-step')}{ranks}; "
        f"activation checkpointing: {plan.activation_checkpointing}, {'compiled' if compiled else 'not compiled'}"
    )
    if plan.tokens_per_sec:
        seconds = config.max_steps * config.tokens_per_step / plan.tokens_per_sec
        yield f"{format_speed(plan)}, {config.max_steps:,} steps in {format_duration(seconds)}"
    if tokens := count_train_tokens(config):
        yield f"{config.max_steps * config.tokens_per_step / tokens:.2g} passes over {tokens:,} tokens"
    each = estimate_checkpoint_bytes(config, shape)
    size, total = format_bytes(each), format_bytes(config.max_checkpoints * each)
    yield f"checkpoints: {size} each, {total} on disk; {size} of the host's memory to copy one"


def estimate_checkpoint_bytes(config: Config, shape: ModelShape) -> int:
    """Estimate a checkpoint's size on disk."""
    return shape.checkpoint_bytes(config.weights_dtype, config.optimizer, config.optimizer_states, config.lora_rank)


def count_train_tokens(config: Config) -> int:
    """Count the training split's tokens; 0 if the dataset has not been prepared yet."""
    try:
        return open_dataset(dataset_dir(config.dataset)).tokens("train")
    except Gpt2boxError:
        return 0


def format_alternatives(
    chosen: ExecutionPlan | None, plans: list[ExecutionPlan], device: TargetDevice
) -> Iterator[str]:
    """Yield for each kind of activation checkpointing the fastest plan that fits, else the smallest."""
    shown: list[tuple[ExecutionPlan, bool]] = []
    for mode in dict.fromkeys(plan.activation_checkpointing for plan in plans):
        alike = [plan for plan in plans if plan.activation_checkpointing == mode]
        fitting = first_fitting_plan(alike, device)
        shown.append((fitting or min(alike, key=lambda plan: plan.total_bytes), fitting is not None))
    for plan, fits in sorted(shown, key=lambda entry: -entry[0].tokens_per_sec):
        speed = f"{plan.tokens_per_sec:>9,.0f} tokens/s{SPEED_MARKS[plan.measured]}" if plan.tokens_per_sec else ""
        verdict = "chosen" if plan == chosen else "fits" if fits else "does not fit"
        yield (
            f"{plan.activation_checkpointing:10} micro_batch_size {plan.micro_batch_size:<4} "
            f"{format_bytes(plan.total_bytes, 2):>10}  {speed}  {verdict}"
        )


def report_as_dict(
    config: Config, shape: ModelShape, device: TargetDevice, chosen: ExecutionPlan, plans: list[ExecutionPlan]
) -> dict[str, Any]:
    """Return the report for programs: bytes, tokens per second, seconds. `kind` says whether a speed was measured."""

    def plan_as_dict(plan: ExecutionPlan) -> dict[str, Any]:
        return {
            "micro_batch_size": plan.micro_batch_size,
            "grad_accum_steps": plan.grad_accum_steps,
            "activation_checkpointing": plan.activation_checkpointing,
            "memory": plan.memory.components() | {"total": plan.memory.total},
            "tokens_per_sec": round(plan.tokens_per_sec, 1) or None,
            "kind": "measured here" if plan.measured else "estimated",
            "measured_bytes": plan.measured_bytes or None,
            "fits": plan.total_bytes <= device.free_bytes,
        }

    total = config.max_steps * config.tokens_per_step
    return {
        "name": config.name,
        "kind": "measured here" if chosen.measured else "estimated",
        "card": device.name,
        "gpus": device.ranks,
        "free_bytes": device.free_bytes,
        "parameters": shape.parameters,
        "compiled": device.compiled and config.may_compile,
        "tokens_per_step": config.tokens_per_step,
        "chosen": plan_as_dict(chosen),
        "seconds": round(total / chosen.tokens_per_sec) if chosen.tokens_per_sec else None,
        "checkpoint_bytes": estimate_checkpoint_bytes(config, shape),
        "alternatives": [plan_as_dict(plan) for plan in plans],
    }


def print_size_table(config: Config, device: TargetDevice, as_json: bool) -> None:
    """Print the fastest plan of each published model size."""
    rows = []
    for name, sizes in MODEL_SHAPES.items():
        shape = ModelShape(**sizes, block_size=config.block_size, vocab_size=GPT2_VOCAB_SIZE, bias=config.bias)
        plans = list_execution_plans(config, shape, device)
        fitting = first_fitting_plan(plans, device)
        rows.append((name, shape, fitting or min(plans, key=lambda plan: plan.total_bytes), fitting is not None))
    if as_json:
        content = [
            {"model": name, "fits": fits, "total_bytes": plan.total_bytes, "micro_batch_size": plan.micro_batch_size,
             "activation_checkpointing": plan.activation_checkpointing, "tokens_per_sec": plan.tokens_per_sec or None}
            for name, _, plan, fits in rows
        ]  # fmt: skip
        print(json.dumps(content, indent=2))
        return
    print(f"on {device.name} ({device.memory_note}), block_size {config.block_size}; all estimated")
    for name, shape, plan, fits in rows:
        speed = f"{plan.tokens_per_sec:>9,.0f} tokens/s" if plan.tokens_per_sec and fits else ""
        verdict = "" if fits else "  does not fit"
        print(
            f"  {name:12} {shape.parameters / 1e6:>6.0f}M  micro_batch_size {plan.micro_batch_size:<4} "
            f"checkpointing {plan.activation_checkpointing:10} {format_bytes(plan.total_bytes):>10}  {speed}{verdict}"
        )
