"""Build run plans with a fixed execution plan."""

from __future__ import annotations

from dataclasses import replace

from gpt2box.config import loader
from gpt2box.config.schema import MODEL_SHAPES
from gpt2box.model.shape import ModelShape
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.run_plan import RunPlan, make_run_plan
from gpt2box.planner.search import NCCL_BYTES, list_execution_plans
from gpt2box.planner.target_device import TargetDevice


def planned(
    shape: ModelShape, micro_batch_size: int, mode: str, dtype: str, compiled: bool = False, **settings: object
) -> tuple[RunPlan, ExecutionPlan]:
    """Build a run plan and its execution plan from fixed settings."""
    accumulation, ranks = int(str(settings.pop("accumulation", 2))), int(str(settings.pop("ranks", 1)))
    flags = {
        "dataset": "x",
        "block_size": shape.block_size,
        "micro_batch_size": micro_batch_size,
        "tokens_per_step": micro_batch_size * shape.block_size * accumulation * ranks,
        "activation_checkpointing": mode,
        **settings,
    }
    loaded = loader.load_config(None, {key: str(value) for key, value in flags.items()})[0]
    place = TargetDevice("a GPU", 0, None, dtype, on_gpu=True, compiled=compiled, ranks=ranks)
    (way,) = list_execution_plans(loaded, shape, place)
    way = replace(way, memory=replace(way.memory, workspace=way.memory.workspace - (NCCL_BYTES if ranks > 1 else 0)))
    return make_run_plan(loaded, shape, 10**6, "cpu", dtype, way), way


def shape_of(name: str, block_size: int = 1024) -> ModelShape:
    return ModelShape(**MODEL_SHAPES[name], block_size=block_size, vocab_size=50_257)
