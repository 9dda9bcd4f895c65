"""Train a tiny model for a few steps with one optimizer or another."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2box.config import loader
from gpt2box.config.schema import Config
from gpt2box.model.shape import ModelShape
from gpt2box.optim.clipped_step import make_optimizer_step
from gpt2box.optim.factory import make_optimizer
from gpt2box.planner.run_plan import RunPlan, make_run_plan
from gpt2box.planner.search import list_execution_plans
from gpt2box.planner.target_device import TargetDevice
from tests.helpers.models import tiny_model


def plan(**flags: str) -> RunPlan:
    settings = loader.load_config(None, {"dataset": "x", "max_steps": "1000", "warmup_steps": "100", **flags})[0]
    return planned(settings, ModelShape(3, 4, 32, 24, 101), 10_000)


def planned(settings: Config, shape: ModelShape, train_tokens: int) -> RunPlan:
    way = list_execution_plans(
        settings, shape, TargetDevice("a CPU", 0, None, "float32", on_gpu=False, compiled=False)
    )[0]
    return make_run_plan(settings, shape, train_tokens, "cpu", "float32", way)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def batches(count: int) -> list[Tensor]:
    return list(torch.randint(0, 101, (count, 4, 24), generator=generator()))


def trained(steps: int, micro_steps: int = 1, **flags: str) -> list[Tensor]:
    """Train a tiny model for some steps and return its weights."""
    sizes = {"micro_batch_size": "4", "block_size": "24", "tokens_per_step": f"{96 * micro_steps}"}
    settings = plan(grad_clip="100", **sizes, **flags)
    model = tiny_model(bias=False)  # a key's bias has no gradient but rounding, which AdamW makes large
    model.cast_matrices(torch.bfloat16 if settings.config.weights_dtype == "bfloat16" else torch.float32)
    update = make_optimizer_step(make_optimizer(model, settings), settings)
    data = batches(steps * micro_steps)
    for step in range(steps):
        total = torch.zeros(())
        for micro_step in range(micro_steps):
            x = data[step * micro_steps + micro_step]
            loss = model(x, x.roll(-1, 1), 1.0 / micro_steps)
            update.before_backward(step, micro_step, 1e-3, loss)
            loss.backward()
            total += loss.detach()
        update(total)
    return [p.detach().double() for p in model.parameters()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference between two models' weights."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
