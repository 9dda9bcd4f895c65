"""Find the fastest execution plan that fits into memory. `tokens_per_step` never changes. Importable without torch."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gpt2box.config.schema import Config
from gpt2box.errors import BadInput, MachineCannot
from gpt2box.model.shape import INT8_BLOCK_SIZE, ModelShape
from gpt2box.planner.bench_records import BenchRecord, bench_key
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.gpu_specs import GPU_SPECS, GpuSpec
from gpt2box.planner.memory import StepSettings, estimate_training_memory
from gpt2box.planner.target_device import TargetDevice
from gpt2box.planner.throughput import estimate_device_tokens_per_sec, with_gradient_averaging, with_weight_gathers
from gpt2box.utils.progress import format_bytes

CHECKPOINTING_MODES = ("none", "selective", "full")  # of activations
MAX_MICRO_BATCH_TOKENS = 65_536  # larger micro-batches make no GPU faster
CPU_MICRO_BATCH_SIZE = 4  # on a CPU a larger micro-batch no longer fits in the caches
NCCL_BYTES = 512 << 20  # NCCL's buffers on each of several GPUs; assumed, not measured
REFERENCE_GPU = GPU_SPECS["rtx-4070"]  # ranks the plans if the GPU's own figures are unknown

# Settings that need less memory, the mildest change first.
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
NUMERICS_SETTINGS = {"optimizer_states", "optimizer_in_backward", "weights_dtype"}


@dataclass(frozen=True)
class Fallback:
    """A change of settings with which training fits."""

    flags: str
    plan: ExecutionPlan  # the fastest with these settings
    changes_numbers: bool


def list_execution_plans(config: Config, shape: ModelShape, device: TargetDevice) -> list[ExecutionPlan]:
    """List the execution plans that the settings allow, fastest first, measured ones before estimated ones."""
    plans = list(enumerate_execution_plans(config, shape, device))
    if device.on_gpu:
        spec = device.spec if device.spec and device.spec.bf16_tflops else REFERENCE_GPU
        compiled = device.compiled and config.may_compile
        plans.sort(key=lambda plan: -estimate_tokens_per_sec(config, shape, spec, plan, compiled))
    else:  # least recomputation first, then the micro-batch nearest to what suits a CPU
        plans.sort(
            key=lambda plan: (
                CHECKPOINTING_MODES.index(plan.activation_checkpointing),
                abs(CPU_MICRO_BATCH_SIZE - plan.micro_batch_size),
            )
        )
    plans.sort(key=lambda plan: -plan.tokens_per_sec if plan.measured else 0.0)  # stable: estimated ones keep order
    return plans


def enumerate_execution_plans(config: Config, shape: ModelShape, device: TargetDevice) -> Iterator[ExecutionPlan]:
    """Yield the execution plans that the settings allow, in no order."""
    compiled = device.compiled and config.may_compile
    sequences = config.tokens_per_step // config.block_size // device.ranks
    largest = max(MAX_MICRO_BATCH_TOKENS // shape.block_size, 1) if device.on_gpu else CPU_MICRO_BATCH_SIZE
    sizes = [n for n in range(1, min(sequences, largest) + 1) if sequences % n == 0]
    if config.micro_batch_size != "auto":
        sizes = [config.micro_batch_size]
    # The compiler undoes selective checkpointing, and LoRA needs the activations that it would drop.
    modes = ["none", "full"] if compiled or config.lora_rank else list(CHECKPOINTING_MODES)
    if config.activation_checkpointing != "auto":
        modes = [config.activation_checkpointing]
    records: dict[tuple[int, str, bool], BenchRecord] = {}
    if device.bench_records and device.ranks == 1:  # bench measures a single GPU
        key = bench_key(device.bench_name, config, shape, device.dtype)
        records = {record.plan_key: record for record in device.bench_records if record.job == key}
    for micro_batch_size, mode in itertools.product(sizes, modes):
        grad_accum_steps = sequences // micro_batch_size
        step = StepSettings(
            micro_batch_size=micro_batch_size,
            accumulates=grad_accum_steps > 1 or device.ranks > 1,  # several ranks keep their gradient buffers
            dtype=device.dtype,
            activation_checkpointing=mode,
            loss_chunk_tokens=config.loss_chunk_tokens,
            dropout=config.dropout > 0,
            on_gpu=device.on_gpu,
            compiled=compiled,
            weights_dtype=config.weights_dtype,
            optimizer=config.optimizer,
            optimizer_states=config.optimizer_states,
            optimizer_in_backward=config.optimizer_in_backward,
            lora_rank=config.lora_rank,
            shards=device.ranks if config.shard else 1,
            deterministic=config.deterministic is True,
        )
        memory = estimate_training_memory(shape, step)
        if device.ranks > 1 and device.on_gpu:
            memory = replace(memory, workspace=memory.workspace + NCCL_BYTES)
        plan = ExecutionPlan(micro_batch_size, grad_accum_steps, mode, memory, 0.0, device.ranks, compile=compiled)
        if device.spec and device.on_gpu and device.dtype == "bfloat16":
            speed = estimate_tokens_per_sec(config, shape, device.spec, plan, compiled)
            plan = replace(plan, tokens_per_sec=speed)
        yield with_bench_record(plan, records.get((micro_batch_size, mode, compiled)))


def with_bench_record(plan: ExecutionPlan, record: BenchRecord | None) -> ExecutionPlan:
    """Replace a plan's estimates by measurements. If memory ran out, the plan needs more than was free then."""
    if record is None:
        return plan
    if not record.fits:
        return replace(plan, measured_bytes=max(record.free_bytes + 1, plan.memory.total))
    speed = record.tokens_per_sec(plan.grad_accum_steps)
    return replace(plan, tokens_per_sec=speed, measured=True, measured_bytes=record.peak_bytes)


def estimate_tokens_per_sec(
    config: Config, shape: ModelShape, spec: GpuSpec, plan: ExecutionPlan, compiled: bool
) -> float:
    """Estimate the training speed of all ranks together."""
    adapters = shape.adapter_parameters(config.lora_rank)
    low_memory = config.optimizer_states != "float32" or config.weights_dtype != "float32"
    updates = plan.grad_accum_steps if config.optimizer_in_backward else int(low_memory)
    speed = estimate_device_tokens_per_sec(
        shape,
        spec,
        plan.micro_batch_size,
        plan.grad_accum_steps,
        plan.activation_checkpointing,
        compiled,
        low_memory_updates=updates,
        adapter_parameters=adapters,
        muon=config.optimizer == "muon",
        ranks=plan.ranks if config.shard else 1,
    )
    gradient_bytes = 4 * adapters or plan.memory.weights
    if config.shard:
        speed = with_weight_gathers(speed, plan.micro_batch_size * shape.block_size, plan.ranks, shape)
        gradient_bytes = 0  # reduced in every micro-step
    return with_gradient_averaging(speed, config.tokens_per_step, plan.ranks, gradient_bytes)


def first_fitting_plan(plans: list[ExecutionPlan], device: TargetDevice) -> ExecutionPlan | None:
    """Return the first plan that fits into the device's free memory."""
    return next((plan for plan in plans if plan.total_bytes <= device.free_bytes), None)


def next_smaller_plan(plans: list[ExecutionPlan], exceeded: dict[str, int]) -> ExecutionPlan | None:
    """Return the first plan that needs clearly less memory than one that ran out of it.

    Args:
        exceeded: that plan's memory as `MemoryEstimate.components` returns it.
    """

    def plan_dependent(memory: dict[str, int]) -> int:
        return sum(memory[name] for name in ("weights", "gradients", "optimizer", "activations", "loss"))

    limit = 0.95 * plan_dependent(exceeded)
    return next((plan for plan in plans if plan_dependent(plan.memory.components()) < limit), None)


def choose_execution_plan(
    plans: list[ExecutionPlan], config: Config, shape: ModelShape, device: TargetDevice
) -> ExecutionPlan:
    """Return the first plan that fits.

    Raises MachineCannot: none fits; the message names the nearest one and the mildest change of settings that fits.
    """
    if plan := first_fitting_plan(plans, device):
        return plan
    nearest = min(plans, key=lambda plan: plan.total_bytes)
    advice = "a smaller model or block_size; or close other programs"
    if fallback := next(find_fallbacks(config, shape, device), None):
        cost = "; changes the numbers, see docs/memory.md: a run that has begun goes on as it was"
        cost = cost if fallback.changes_numbers else ""
        newer = "; needs PyTorch 2.6, as STACK=cu13x has" if "--shard" in fallback.flags else ""
        plan = fallback.plan
        advice = f"{fallback.flags} fits ({format_bytes(plan.total_bytes)}, {plan.describe()}{cost}{newer})"
    raise MachineCannot(
        f"{device.name} has {format_bytes(max(device.free_bytes, 0))} free; the least that these settings need is "
        f"{format_bytes(nearest.total_bytes)} ({nearest.describe()}; estimated)",
        "a plan that fits",
        advice,
    )


def find_fallbacks(config: Config, shape: ModelShape, device: TargetDevice) -> Iterator[Fallback]:
    """Yield changes of settings with which training fits, the mildest first."""
    tried: list[dict[str, Any]] = [{}]
    for settings in FALLBACK_SETTINGS:
        if device.ranks > 1 and "optimizer_in_backward" in settings:
            continue
        if config.compile is True and "optimizer_in_backward" in settings:  # the two exclude each other
            settings = settings | {"compile": "auto"}
        changes = {key: value for key, value in settings.items() if getattr(config, key) != value}
        if config.lora_rank:  # its optimizer state is small
            changes = {key: value for key, value in changes.items() if not key.startswith("optimizer")}
        if config.optimizer == "muon":  # needs complete gradients
            changes.pop("optimizer_in_backward", None)
        if not (device.compiled and config.may_compile):
            changes.pop("compile", None)
        if device.ranks == 1 or config.lora_rank or config.weights_dtype != "float32":
            changes.pop("shard", None)
        if changes in tried:
            continue
        tried.append(changes)
        changed = config.model_copy(update=changes)
        if find_unshardable_matrix(changed, shape, device.ranks):
            continue
        if plan := first_fitting_plan(list_execution_plans(changed, shape, device), device):
            flags = " ".join(f"--{key.replace('_', '-')} {str(value).lower()}" for key, value in changes.items())
            yield Fallback(flags, plan, bool(changes.keys() & NUMERICS_SETTINGS))


def find_unshardable_matrix(config: Config, shape: ModelShape, ranks: int) -> tuple[int, int] | None:
    """Return rows and columns of a matrix whose int8 optimizer state the ranks cannot share; None if there is none.

    Its rows do not divide evenly, or numbers that share a scale would lie on two ranks.
    """
    if not config.shard or config.optimizer_states != "int8":
        return None
    C = shape.n_embd
    sizes = ((C, C), (C, 4 * C), (shape.padded_vocab_size, C), (shape.block_size, C))
    return next((s for s in sizes if s[0] % ranks or s[0] // ranks * s[1] % INT8_BLOCK_SIZE), None)


def check_sharding(config: Config, shape: ModelShape, ranks: int) -> None:
    """Check that the ranks can share the optimizer state. Raises BadInput: See `find_unshardable_matrix`."""
    if matrix := find_unshardable_matrix(config, shape, ranks):
        rows, width = matrix
        raise BadInput(
            f"shard true and optimizer_states int8 with {ranks} ranks: a matrix of {rows} × {width} cannot be sharded",
            f"for each rank as many rows, {INT8_BLOCK_SIZE} numbers at a time",
            "--optimizer-states float32, or another number of GPUs",
        )
