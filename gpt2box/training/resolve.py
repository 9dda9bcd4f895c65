"""From settings to a plan: device, dtype, model shape and execution plan. Used by train, bench and verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from gpt2box.checkpoint import retention
from gpt2box.config.schema import Config
from gpt2box.config.validation import check_ranks
from gpt2box.data.dataset import Dataset
from gpt2box.data.pretrained import load_initial_shape, load_shape, pretrained_folder
from gpt2box.distributed.group import RankGroup
from gpt2box.errors import MachineCannot
from gpt2box.model.shape import ModelShape
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.gpu_specs import gpu_spec_of_device
from gpt2box.planner.memory import CUDA_CONTEXT_BYTES
from gpt2box.planner.run_plan import RunPlan, make_run_plan
from gpt2box.planner.search import check_sharding, choose_execution_plan, list_execution_plans
from gpt2box.planner.target_device import TargetDevice, apply_bench_records
from gpt2box.preflight.preflight import check_gpu
from gpt2box.runs import wandb
from gpt2box.runs.manifest import read_plan
from gpt2box.system.determinism import enable_determinism
from gpt2box.system.device import choose_compile, choose_device, choose_dtype, describe_device
from gpt2box.system.gpu import find_gpu
from gpt2box.system.host import cpu_name, memory_bytes
from gpt2box.training.resume import load_or_prepare_dataset
from gpt2box.utils.paths import checkpoint_step, list_checkpoints, run_dir
from gpt2box.utils.progress import log_line
from gpt2box.utils.ranks import RankInfo, rank_info


class ResolvedDevice(NamedTuple):
    """The device of a run, as settings and machine allow."""

    device: torch.device
    dtype: str  # of matrix products
    compile: bool


@dataclass(frozen=True)
class ResolvedRun:
    """Everything about a run that is known before its folder is opened."""

    config: Config
    dataset: Dataset
    weights: Path | None  # the folder to start from, if any
    device: torch.device
    target: TargetDevice
    plan: RunPlan


def resolve(config: Config, group: RankGroup, text: Path | None = None, notes: Sequence[str] = ()) -> ResolvedRun:
    """Resolve settings to dataset, device, model shape and plan, the same on all ranks.

    `text`: the file that the dataset is prepared from if it does not exist. `notes`: printed once the dataset is there.

    Raises:
        BadInput: settings, weights and dataset do not fit.
        MachineCannot: the device is missing, or nothing fits into its memory.
    """
    ranks = group.ranks
    group.run_on_rank0(lambda: check_ranks(config, ranks.world_size))
    wanted = rank_device(config.device, ranks)
    check_gpu(wanted)
    group.run_on_rank0(lambda: wandb.check_available(config.wandb))
    dataset = load_or_prepare_dataset(config, text, group)
    for line in notes:
        log_line(f"note: {line}")
    device, dtype, compiled = resolve_device(config, wanted)
    weights, shape = group.run_on_rank0(lambda: resolve_shape(config, dataset))
    group.run_on_rank0(lambda: check_sharding_support(config, shape, ranks.world_size))
    target = weakest_device(group.all_gather(target_device_for_run(config, shape, device, dtype, compiled)))
    if device.index:
        torch.cuda.set_device(device)  # otherwise this process also holds some of GPU 0's memory
    execution = group.run_on_rank0(lambda: choose_execution(config, shape, target))
    peak = target.spec.bf16_tflops if target.spec and target.on_gpu and target.dtype == "bfloat16" else 0.0
    plan = make_run_plan(config, shape, dataset.tokens("train"), str(device), target.dtype, execution, peak)
    set_arithmetic(plan)
    return ResolvedRun(config, dataset, weights, device, target, plan)


def resolve_device(config: Config, wanted: str | None = None) -> ResolvedDevice:
    """Choose the device, the dtype of products, and whether to compile. `wanted`: in place of config.device.

    Raises:
        MachineCannot: no such device, or it cannot do what the settings ask for.
    """
    device = choose_device(wanted or config.device)
    compiled, note = choose_compile(config.compile if config.may_compile else False, device)
    if note:
        log_line(f"note: {note}")
    return ResolvedDevice(device, str(choose_dtype(config.dtype, device)).removeprefix("torch."), compiled)


def detect_target_device(device: torch.device, dtype: str, compiled: bool) -> TargetDevice:
    """Describe a device and the memory that is free on it now."""
    card = find_gpu(str(device))
    if device.type == "cuda":
        free = card.free_bytes if card else None
        if free is None:  # PyTorch's figure already excludes the CUDA context
            free = torch.cuda.mem_get_info(device)[0] + CUDA_CONTEXT_BYTES
    else:
        free = memory_bytes()[1] // rank_info().local_world_size
    kind = gpu_spec_of_device(card.name, card.total_bytes) if card else None
    name = (card.name if card else "") if device.type == "cuda" else cpu_name()
    return TargetDevice(describe_device(device), free, kind, dtype, device.type == "cuda", compiled, name)


def target_device_for_run(
    config: Config, shape: ModelShape, device: torch.device, dtype: str, compiled: bool
) -> TargetDevice:
    """Describe a run's device with its bench records. A run that has begun stays compiled or eager."""
    place = detect_target_device(device, dtype, compiled)
    known = apply_bench_records(place, config, shape, can_compile=choose_compile(True, device)[0])
    if read_plan(run_dir(config.name)).get("compile") == compiled:
        return replace(known, compiled=compiled)
    return known


def weakest_device(places: list[TargetDevice]) -> TargetDevice:
    """Return the device with the least memory and speed of all ranks: they share one plan and wait for the slowest."""
    free = min(place.free_bytes for place in places)
    kinds = [place.spec for place in places]
    known = [kind for kind in kinds if kind]
    slowest = min(known, key=lambda kind: kind.bf16_tflops) if len(known) == len(kinds) else None
    dtype = "float32" if any(place.dtype == "float32" for place in places) else places[0].dtype
    compiled = all(place.compiled for place in places)
    name = places[0].name if len(places) == 1 else f"{len(places)} × {places[0].name}"
    on_gpu, measured = places[0].on_gpu, places[0].bench_records
    return TargetDevice(name, free, slowest, dtype, on_gpu, compiled, places[0].bench_name, measured, len(places))


def check_sharding_support(config: Config, shape: ModelShape, count: int) -> None:
    """Check that `count` ranks can share the weights if `shard` is set.

    Raises:
        MachineCannot: FSDP2 was not public in this PyTorch yet.
        BadInput: see check_sharding.
    """
    if not config.shard or count == 1:
        return
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise MachineCannot(
            f"shard true with PyTorch {torch.__version__}, whose FSDP2 is not finished",
            "PyTorch 2.6 or later",
            "STACK=cu13x has it (docs/containers.md); or --shard false",
        )
    check_sharding(config, shape, count)


def rank_device(wanted: str, own: RankInfo) -> str:
    """Return the device of this rank: each of several ranks has its own GPU. `wanted`: the setting `device`."""
    if own.world_size == 1 or wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return wanted
    return f"cuda:{own.local_rank}"


def choose_execution(config: Config, shape: ModelShape, place: TargetDevice) -> ExecutionPlan:
    """Choose the execution plan that the run had before if it still fits, else the fastest that fits.

    Raises:
        MachineCannot: nothing that the settings leave open fits into the memory that is free now.
    """
    found = list_execution_plans(config, shape, place)
    if config.eval_only or not has_steps_left(config):
        return found[0]  # nothing is trained
    before = recorded_execution(run_dir(config.name))
    found.sort(key=lambda option: (option.micro_batch_size, option.activation_checkpointing) != before)
    return choose_execution_plan(found, config, shape, place)


def list_fallback_plans(config: Config, shape: ModelShape, place: TargetDevice) -> list[ExecutionPlan]:
    """List all execution plans as fallbacks for out-of-memory errors, also those that the settings exclude."""
    open_ = config.model_copy(update={"micro_batch_size": "auto", "activation_checkpointing": "auto"})
    return list_execution_plans(open_, shape, place)


def has_steps_left(config: Config) -> bool:
    """Return whether steps are left, by the name of the newest checkpoint."""
    done = list_checkpoints(run_dir(config.name) / "checkpoints")
    return not done or checkpoint_step(done[-1]) < config.max_steps


def recorded_execution(run: Path) -> tuple[int, str] | None:
    """Return the micro-batch size and the activation checkpointing in a run's plan.json."""
    content = read_plan(run)
    if not {"micro_batch_size", "activation_checkpointing"} <= content.keys():
        return None
    return content["micro_batch_size"], content["activation_checkpointing"]


def resolve_shape(config: Config, dataset: Dataset) -> tuple[Path | None, ModelShape]:
    """Return the folder of the weights to start from, if any, and the model's shape.

    Raises:
        BadInput: the settings and the weights, or the weights and the dataset, do not fit.
    """
    if config.init_from == "scratch":
        shape = ModelShape(
            **config.shape(), block_size=config.block_size, vocab_size=dataset.tokenizer.vocab_size, bias=config.bias
        )
        return None, shape
    begun = retention.find_intact_config(run_dir(config.name) / "checkpoints")
    if begun and not config.eval_only and not config.lora_rank:  # resuming: the first weights may be gone
        return None, load_shape(begun)
    folder = pretrained_folder(config.init_from)
    return folder, load_initial_shape(config, folder, dataset.tokenizer)


def set_arithmetic(plan: RunPlan) -> None:
    """Set determinism and TF32 for this process, before its first product."""
    if plan.derived.deterministic:
        enable_determinism(plan.execution.compile)
    if not plan.derived.device.startswith("cpu"):
        torch.set_float32_matmul_precision("high")  # TF32 for float32 products
