"""The step inside the backward pass matches AdamW, frees gradients and clips each tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt2box.optim import low_memory_adamw
from gpt2box.optim.clipped_step import make_optimizer_step
from gpt2box.optim.factory import make_optimizer
from gpt2box.optim.in_backward import InBackwardStep
from gpt2box.optim.low_memory_adamw import LowMemoryAdamW
from tests.helpers.models import tiny_model
from tests.helpers.optimizers import batches, distance, plan, trained


def test_a_single_micro_step_matches_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_memory_adamw, "CHUNK", 1024)  # several chunks per tensor, the last one partial
    assert distance(trained(4), trained(4, optimizer_in_backward="true")) < 1e-6

    model = tiny_model(bias=False, dtype=torch.float64)
    groups = [{"params": [p]} for p in model.parameters()]
    for group in groups:
        group["weight_decay"] = 0.1 if group["params"][0].dim() >= 2 else 0.0  # type: ignore[assignment]
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for x in batches(4):
        reference.zero_grad()
        model(x, x.roll(-1, 1)).backward()
        reference.step()
    exact = [p.detach() for p in model.parameters()]
    assert distance(exact, trained(4, optimizer_in_backward="true")) < 1e-5  # the weights moved by 4e-3


def test_accumulating_in_the_optimizer_state_stays_close_to_accumulating_gradients() -> None:
    moved = distance(trained(0), trained(4, micro_steps=4))
    assert distance(trained(4, micro_steps=4), trained(4, micro_steps=4, optimizer_in_backward="true")) < moved


def test_gradients_are_freed_as_soon_as_they_are_used() -> None:
    settings = plan(optimizer_in_backward="true", tokens_per_step="1024")
    model = tiny_model()
    update = make_optimizer_step(make_optimizer(model, settings), settings)
    present: list[int] = []

    def count_gradients(parameter: Tensor) -> None:
        present.append(sum(p.grad is not None for p in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count_gradients)
    (x,) = batches(1)
    loss = model(x, x.roll(-1, 1))
    update.before_backward(0, 0, 1e-3, loss)
    loss.backward()
    assert len(present) == len(list(model.parameters())) and max(present) == 0


def test_each_tensors_gradient_is_clipped_to_grad_clip() -> None:
    model = tiny_model()
    optimizer = LowMemoryAdamW([{"params": list(model.parameters())}], 1e-3, (0.9, 0.95), "float32", 0)
    update = InBackwardStep(optimizer, 0.01, 1, torch.device("cpu"))
    (x,) = batches(1)
    loss = model(x, x.roll(-1, 1))
    update.before_backward(0, 0, 1e-3, loss)
    loss.backward()
    norm = update(loss)
    reference = tiny_model()
    reference(x, x.roll(-1, 1)).backward()
    norms = [float(p.grad.norm()) for p in reference.parameters() if p.grad is not None]
    assert float(norm) == pytest.approx(sum(n * n for n in norms) ** 0.5, rel=1e-5)
    for parameter, unclipped in zip(model.parameters(), norms, strict=True):
        applied = optimizer.state[parameter]["exp_avg"].norm() / 0.1
        assert float(applied) == pytest.approx(min(unclipped, 0.01), rel=1e-4)
