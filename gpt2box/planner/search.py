"""Which micro-batch and how much recompute: the fastest plan that fits the memory. `tokens_per_step` never changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gpt2box.config.schema import Config
from gpt2box.errors import BadInput, MachineCannot
from gpt2box.model.shape import EIGHT_BIT_BLOCK, ModelShape
from gpt2box.planner.bench_records import BenchRecord, bench_key, read_bench_records, should_compile
from gpt2box.planner.execution_plan import ExecutionPlan, TargetDevice
from gpt2box.planner.gpu_specs import GPU_SPECS, GpuSpec
from gpt2box.planner.memory import Step, training_memory
from gpt2box.planner.throughput import between_gathers, together, tokens_per_sec
from gpt2box.utils.paths import bench_file
from gpt2box.utils.progress import size

CHECKPOINTING_MODES = ("none", "selective", "full")
MAX_MICRO_BATCH_TOKENS = 65_536  # of a micro-batch: more make no card faster
CPU_MICRO_BATCH_SIZE = 4  # on a CPU a larger micro-batch only falls out of the caches
NCCL_BYTES = 512 << 20  # that it keeps on each of several cards; assumed, not measured
BF16_FROM = (8, 0)  # compute capability with bfloat16 in hardware
REFERENCE_GPU = GPU_SPECS[
    "rtx-4070"
]  # whose balance of arithmetic and bandwidth orders the choices where the card is unknown


# Settings that take less memory, the mildest first.
FALLBACK_SETTINGS: list[dict[str, Any]] = [
    {"micro_batch_size": "auto", "activation_checkpointing": "auto"},
    {"compile": False},
    {"shard": True},
    {"optimizer_states": "int8"},
    {"optimizer_states": "int8", "shard": True},
    {"optimizer_states": "int8", "compile": False},
    {"optimizer_states": "int8", "optimizer_in_backward": True},
    {"optimizer_states": "int8", "optimizer_in_backward": True, "weights_dtype": "bfloat16"},
]
CHANGES_NUMBERS = {"optimizer_states", "optimizer_in_backward", "weights_dtype"}


def list_execution_plans(config: Config, shape: ModelShape, place: TargetDevice) -> list[ExecutionPlan]:
    """Every way that the settings leave open, fastest first; a setting that is not `auto` is obeyed.

    What was measured here goes before what is estimated.
    """
    found = list(enumerate_execution_plans(config, shape, place))
    if place.on_gpu:
        ranking = place.spec if place.spec and place.spec.bf16_tflops else REFERENCE_GPU
        compiled = place.compiled and config.may_compile
        found.sort(key=lambda option: -estimate_tokens_per_sec(config, shape, ranking, option, compiled))
    else:  # less recompute first, then the largest micro-batch up to what suits a CPU
        found.sort(
            key=lambda o: (
                CHECKPOINTING_MODES.index(o.activation_checkpointing),
                abs(CPU_MICRO_BATCH_SIZE - o.micro_batch_size),
            )
        )
    found.sort(key=lambda option: -option.tokens_per_sec if option.measured else 0.0)  # the others keep their order
    return found


def apply_bench_records(
    place: TargetDevice, config: Config, shape: ModelShape, can_compile: bool = True
) -> TargetDevice:
    """With what was measured there, and compiled or not as was faster, where both were tried and it is left open."""
    if not place.bench_name:
        return place
    records, compiled = read_bench_records(bench_file(), place.bench_name), place.compiled
    if config.compile == "auto" and config.may_compile and can_compile:
        job = bench_key(place.bench_name, config, shape, place.dtype)
        compiled = should_compile(records, job, config.tokens_per_step, place.compiled)
    return replace(place, bench_records=records, compiled=compiled)


def check_ranks_divide_step(config: Config, ranks: int) -> None:
    """Whether a step can be shared by so many ranks.

    Raises:
        BadInput: its sequences cannot be dealt evenly, or a setting is for one GPU alone.
    """
    if ranks == 1:
        return
    if config.optimizer_in_backward:
        raise BadInput(
            f"optimizer_in_backward with {ranks} ranks: gradients are to be averaged before a step takes them in",
            "one GPU",
            "--optimizer-in-backward false; --optimizer-states int8 saves memory on several, too",
        )
    if ":" in config.device:
        raise BadInput(f"device {config.device} with {ranks} ranks", "auto, cpu or cuda: each rank takes its own card")
    micro_batch_size = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    each = micro_batch_size * config.block_size * ranks
    if config.tokens_per_step % each:
        below = config.tokens_per_step // each * each
        raise BadInput(
            f"tokens_per_step {config.tokens_per_step} with {ranks} ranks",
            f"a multiple of ranks × micro_batch_size × block_size ({ranks} × {micro_batch_size} × {config.block_size} "
            f"= {each} tokens), such as {f'{below} or ' if below else ''}{below + each}",
        )


def uncut(config: Config, shape: ModelShape, ranks: int) -> tuple[int, int] | None:
    """Rows and columns of a matrix whose averages in 8 bits so many ranks cannot share, where they are to.

    Numbers that share a scale would come to lie on two of them.
    """
    if not config.shard or config.optimizer_states != "int8":
        return None
    C = shape.n_embd
    sizes = ((C, C), (C, 4 * C), (shape.padded_vocab_size, C), (shape.block_size, C))
    return next((s for s in sizes if s[0] % ranks or s[0] // ranks * s[1] % EIGHT_BIT_BLOCK), None)


def check_sharding(config: Config, shape: ModelShape, ranks: int) -> None:
    """Whether there is none.

    Raises:
        BadInput: there is.
    """
    if found := uncut(config, shape, ranks):
        rows, width = found
        raise BadInput(
            f"shard true and optimizer_states int8 with {ranks} ranks: a matrix of {rows} × {width} cannot be cut",
            f"for each rank as many rows, {EIGHT_BIT_BLOCK} numbers at a time",
            "--optimizer-states float32, or another number of GPUs",
        )


def enumerate_execution_plans(config: Config, shape: ModelShape, place: TargetDevice) -> Iterator[ExecutionPlan]:
    """The options in no order."""
    compiled = place.compiled and config.may_compile
    sequences = config.tokens_per_step // config.block_size // place.ranks
    most = min(sequences, max(MAX_MICRO_BATCH_TOKENS // shape.block_size, 1) if place.on_gpu else CPU_MICRO_BATCH_SIZE)
    sizes = [n for n in range(1, most + 1) if sequences % n == 0]
    if config.micro_batch_size != "auto":
        sizes = [config.micro_batch_size]
    # Compiled, selective is undone (see memory.py); the adapters need what it would make again.
    modes = ["none", "full"] if compiled or config.lora_rank else list(CHECKPOINTING_MODES)
    if config.activation_checkpointing != "auto":
        modes = [config.activation_checkpointing]
    # What is measured is measured on one card alone.
    job = bench_key(place.bench_name, config, shape, place.dtype) if place.bench_records and place.ranks == 1 else None
    measured = {record.way: record for record in place.bench_records if record.job == job}
    for count, mode in itertools.product(sizes, modes):
        accumulation = sequences // count
        step = Step(
            micro_batch_size=count,
            accumulates=accumulation > 1 or place.ranks > 1,  # whose gradients are always there
            dtype=place.dtype,
            activation_checkpointing=mode,
            loss_chunk_tokens=config.loss_chunk_tokens,
            dropout=config.dropout > 0,
            on_gpu=place.on_gpu,
            compiled=compiled,
            weights_dtype=config.weights_dtype,
            optimizer=config.optimizer,
            optimizer_states=config.optimizer_states,
            optimizer_in_backward=config.optimizer_in_backward,
            lora_rank=config.lora_rank,
            split=place.ranks if config.shard else 1,
            deterministic=config.deterministic is True,
        )
        memory = training_memory(shape, step)
        if place.ranks > 1 and place.on_gpu:
            memory = replace(memory, workspace=memory.workspace + NCCL_BYTES)
        option = ExecutionPlan(count, accumulation, mode, memory, 0.0, place.ranks)
        if place.spec and place.on_gpu and place.dtype == "bfloat16":
            option = replace(
                option, tokens_per_sec=estimate_tokens_per_sec(config, shape, place.spec, option, compiled)
            )
        yield with_bench_record(option, measured.get((count, mode, compiled)))


def with_bench_record(option: ExecutionPlan, record: BenchRecord | None) -> ExecutionPlan:
    """With what was measured in place of what is estimated. Where memory ran out, it takes more than was free then."""
    if record is None:
        return option
    if not record.fits:
        return replace(option, measured_bytes=max(record.free_bytes + 1, option.memory.total))
    estimate_tokens_per_sec = record.tokens_per_sec(option.grad_accum_steps)
    return replace(option, tokens_per_sec=estimate_tokens_per_sec, measured=True, measured_bytes=record.peak_bytes)


def estimate_tokens_per_sec(
    config: Config, shape: ModelShape, kind: GpuSpec, option: ExecutionPlan, compiled: bool
) -> float:
    """Expected tokens a second."""
    way = (option.micro_batch_size, option.grad_accum_steps, option.activation_checkpointing)
    if config.lora_rank:
        adapters = shape.adapter_parameters(config.lora_rank)
        alone = tokens_per_sec(shape, kind, *way, compiled, adapters=adapters)
        return together(alone, config.tokens_per_step, option.ranks, 4 * adapters)
    lean = config.optimizer_states != "float32" or config.weights_dtype != "float32"
    updates = option.grad_accum_steps if config.optimizer_in_backward else int(lean)
    share = option.ranks if config.shard else 1
    alone = tokens_per_sec(shape, kind, *way, compiled, updates, muon=config.optimizer == "muon", ranks=share)
    if config.shard:
        alone = between_gathers(alone, option.micro_batch_size * shape.block_size, option.ranks, shape)
        return together(alone, config.tokens_per_step, option.ranks, 0)
    return together(alone, config.tokens_per_step, option.ranks, option.memory.weights)


def next_smaller_plan(found: list[ExecutionPlan], too_much: dict[str, int]) -> ExecutionPlan | None:
    """The fastest of the options that takes clearly less than what turned out to be too much (bytes by part)."""

    def varying(parts: dict[str, int]) -> int:
        return sum(parts[name] for name in ("weights", "gradients", "optimizer", "activations", "loss"))

    return next((option for option in found if varying(option.memory.parts()) < 0.95 * varying(too_much)), None)


def first_fitting_plan(found: list[ExecutionPlan], place: TargetDevice) -> ExecutionPlan | None:
    """The first of the options that fits into what is free; `options` has the fastest first."""
    return next((option for option in found if option.total_bytes <= place.free_bytes), None)


def fallback_settings(
    config: Config, shape: ModelShape, place: TargetDevice
) -> Iterator[tuple[str, ExecutionPlan, bool]]:
    """Other settings with which something fits: as flags, the fastest way with them, whether numbers change."""
    tried: list[dict[str, Any]] = [{}]
    compiles = place.compiled and config.may_compile
    for changes in FALLBACK_SETTINGS:
        if config.compile is True and "optimizer_in_backward" in changes:  # the two exclude each other
            changes = changes | {"compile": "auto"}
        changed = {key: value for key, value in changes.items() if getattr(config, key) != value}
        if place.ranks > 1 and "optimizer_in_backward" in changes:
            continue
        if config.lora_rank:  # whose optimizer takes next to nothing
            changed = {key: value for key, value in changed.items() if not key.startswith("optimizer")}
        if config.optimizer == "muon":  # which takes no part of a gradient
            changed.pop("optimizer_in_backward", None)
        if not compiles:
            changed.pop("compile", None)
        if place.ranks == 1 or config.lora_rank or config.weights_dtype != "float32":
            changed.pop("shard", None)
        if changed in tried:
            continue
        tried.append(changed)
        other = config.model_copy(update=changed)
        if uncut(other, shape, place.ranks):
            continue
        if way := first_fitting_plan(list_execution_plans(other, shape, place), place):
            flags = " ".join(f"--{key.replace('_', '-')} {str(value).lower()}" for key, value in changed.items())
            yield flags, way, bool(changed.keys() & CHANGES_NUMBERS)


def choose_execution_plan(
    found: list[ExecutionPlan], config: Config, shape: ModelShape, place: TargetDevice
) -> ExecutionPlan:
    """The first of the options that fits.

    Raises:
        MachineCannot: none does; says which comes nearest, and the mildest change of settings that does fit.
    """
    if way := first_fitting_plan(found, place):
        return way
    nearest = min(found, key=lambda option: option.total_bytes)
    flags, way, changes = next(fallback_settings(config, shape, place), ("", nearest, False))
    cost = "; changes the numbers, see docs/memory.md: a run that has begun goes on as it was" if changes else ""
    newer = "; needs PyTorch 2.6, as STACK=cu13x has" if "--shard" in flags else ""
    raise MachineCannot(
        f"{place.name} has {size(max(place.free_bytes, 0))} free; the least that these settings need is "
        f"{size(nearest.total_bytes)} ({nearest.describe()}; estimated)",
        "a plan that fits",
        f"{flags} fits ({size(way.total_bytes)}, {way.describe()}{cost}{newer})"
        if flags
        else "a smaller model or block_size; or close other programs",
    )
