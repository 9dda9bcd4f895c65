"""Optimizer state in 8 bits and bfloat16 weights: results stay close, and non-finite steps change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt2box.optim.clipped_step import ClippedStep, make_optimizer_step
from gpt2box.optim.factory import make_optimizer
from gpt2box.optim.in_backward import InBackwardStep
from tests.helpers.models import tiny_model
from tests.helpers.optimizers import batches, plan, trained


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer_states": "int8"},
        {"weights_dtype": "bfloat16"},
        {"optimizer_states": "int8", "weights_dtype": "bfloat16", "optimizer_in_backward": "true"},
    ],
)
def test_low_memory_settings_stay_close_to_adamw_and_are_deterministic(flags: dict[str, str]) -> None:
    adamw, low_memory, start = trained(8), trained(8, **flags), trained(0)
    difference = torch.cat([(a - b).flatten() for a, b in zip(adamw, low_memory, strict=True)]).norm()
    moved = torch.cat([(a - b).flatten() for a, b in zip(adamw, start, strict=True)]).norm()
    assert 0 < difference < 0.6 * moved
    assert all(torch.equal(a, b) for a, b in zip(low_memory, trained(8, **flags), strict=True))


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer_states": "int8", "optimizer_in_backward": "true"},
        {"optimizer_states": "int8"},
        {"optimizer": "muon"},
        {"optimizer": "muon", "optimizer_states": "int8", "weights_dtype": "bfloat16"},
    ],
    ids=["in backward", "int8", "muon", "muon with low memory"],
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_step_changes_neither_weights_nor_optimizer_state(flags: dict[str, str], bad: float) -> None:
    settings = plan(tokens_per_step="1024", **flags)
    model = tiny_model()
    model.cast_matrices(getattr(torch, settings.config.weights_dtype))
    optimizer = make_optimizer(model, settings)
    update = make_optimizer_step(optimizer, settings)
    assert isinstance(update, InBackwardStep if settings.config.optimizer_in_backward else ClippedStep)

    def take_step(step: int, factor: float) -> None:
        (x,) = batches(1)
        loss = model(x, x.roll(-1, 1)) * factor
        update.before_backward(step, 0, 1e-3, loss)
        loss.backward()
        update(loss)

    def copy_state() -> list[Tensor]:
        return [t.clone() for p in model.parameters() for t in (p, *optimizer.state[p].values())]

    take_step(0, 1.0)
    before = copy_state()
    take_step(1, bad)
    assert all(torch.equal(a, b) for a, b in zip(before, copy_state(), strict=True))
    assert (int(update.bad_steps.consecutive), int(update.bad_steps.total)) == (1, 1)
    take_step(2, 1.0)
    after = copy_state()
    assert int(update.bad_steps.consecutive) == 0 and not torch.equal(before[0], after[0])
    assert all(tensor.isfinite().all() for tensor in after)
