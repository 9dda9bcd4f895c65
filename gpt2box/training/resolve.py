"""A run's micro-batch and recompute on the device that is here, with the memory that is free now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from gpt2box.config.schema import Config
from gpt2box.errors import MachineCannot
from gpt2box.model.shape import ModelShape
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.gpu_specs import gpu_spec_of_device
from gpt2box.planner.memory import CUDA_CONTEXT_BYTES
from gpt2box.planner.search import check_sharding, choose_execution_plan, list_execution_plans
from gpt2box.planner.target_device import TargetDevice, apply_bench_records
from gpt2box.runs.plan_file import read_plan
from gpt2box.system.device import choose_compile, describe_device
from gpt2box.system.gpu import find_gpu
from gpt2box.system.host import cpu_name, memory_bytes
from gpt2box.utils.paths import checkpoint_step, list_checkpoints, run_dir
from gpt2box.utils.ranks import RankInfo, rank_info


def detect_target_device(device: torch.device, dtype: str, compiled: bool) -> TargetDevice:
    """The device, with what is free there now."""
    card = find_gpu(str(device))
    if device.type == "cuda":
        free = card.free_bytes if card else None
        if free is None:  # asked through PyTorch, CUDA's own share is already taken
            free = torch.cuda.mem_get_info(device)[0] + CUDA_CONTEXT_BYTES
    else:
        free = memory_bytes()[1] // rank_info().local_world_size
    kind = gpu_spec_of_device(card.name, card.total_bytes) if card else None
    name = (card.name if card else "") if device.type == "cuda" else cpu_name()
    return TargetDevice(describe_device(device), free, kind, dtype, device.type == "cuda", compiled, name)


def target_device_for_run(
    config: Config, shape: ModelShape, device: torch.device, dtype: str, compiled: bool
) -> TargetDevice:
    """The same for a run, with what was measured there. A run that began with the default stays compiled, or not."""
    place = detect_target_device(device, dtype, compiled)
    known = apply_bench_records(place, config, shape, can_compile=choose_compile(True, device)[0])
    if read_plan(run_dir(config.name)).get("compile") == compiled:
        return replace(known, compiled=compiled)
    return known


def weakest_device(places: list[TargetDevice]) -> TargetDevice:
    """Of several ranks' places the least: each rank does the same, and all wait for the slowest."""
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
    """Whether so many ranks can share the weights, where they are to.

    Raises:
        MachineCannot: FSDP2 was not public in this PyTorch yet.
        BadInput: see check_cut.
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
    """Of several ranks, each takes its own card; `wanted` is what the settings say."""
    if own.world_size == 1 or wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return wanted
    return f"cuda:{own.local_rank}"


def choose_execution(config: Config, shape: ModelShape, place: TargetDevice) -> ExecutionPlan:
    """Micro-batch and recompute: those the run had before, where they still fit, else the fastest that fits.

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
    """All ways to do the steps, for when memory runs out, the fixed settings' own as well."""
    open_ = config.model_copy(update={"micro_batch_size": "auto", "activation_checkpointing": "auto"})
    return list_execution_plans(open_, shape, place)


def has_steps_left(config: Config) -> bool:
    """Whether the run has steps left to do, as far as its newest checkpoint's name tells."""
    done = list_checkpoints(run_dir(config.name) / "checkpoints")
    return not done or checkpoint_step(done[-1]) < config.max_steps


def recorded_execution(run: Path) -> tuple[int, str] | None:
    """Micro-batch and recompute in a run's plan.json."""
    content = read_plan(run)
    if not {"micro_batch_size", "activation_checkpointing"} <= content.keys():
        return None
    return content["micro_batch_size"], content["activation_checkpointing"]
