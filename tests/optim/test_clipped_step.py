"""The clipped step matches PyTorch and skips non-finite steps."""

from __future__ import annotations

import pytest
import torch

from gpt2box.optim.clipped_step import ClippedStep
from gpt2box.optim.factory import make_optimizer
from tests.helpers.models import tiny_model
from tests.helpers.optimizers import plan


def test_clipping_matches_pytorch() -> None:
    ours, reference = tiny_model(), tiny_model()
    x = torch.randint(0, 101, (4, 24), generator=torch.Generator().manual_seed(0))
    step = ClippedStep(make_optimizer(ours, plan()), 0.01, torch.device("cpu"))
    other = make_optimizer(reference, plan())
    for _ in range(3):
        loss = ours(x, x.roll(-1, 1))
        step.before_backward(0, 0, 1e-3, loss)
        loss.backward()
        norm = step(loss)
        reference(x, x.roll(-1, 1)).backward()
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
        for group in other.param_groups:
            group["lr"] = 1e-3
        other.step()
        other.zero_grad()
        assert torch.allclose(norm, expected) and norm > 0.1
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5  # the weights moved by 3e-3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_non_finite_step_changes_neither_weights_nor_optimizer_state(bad: float, where: str) -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, plan())
    step = ClippedStep(optimizer, 1.0, torch.device("cpu"))
    x = torch.randint(0, 101, (4, 24))

    def take_step(poisoned: bool) -> None:
        loss = model(x, x.roll(-1, 1))
        step.before_backward(0, 0, 1e-3, loss)
        loss.backward()
        if poisoned and where == "gradient":
            model.wpe.weight.grad[3, 3] = bad
        step(loss * bad if poisoned and where == "loss" else loss)

    def copy_state() -> list[torch.Tensor]:
        return [t.clone() for p in model.parameters() for t in (p, *optimizer.state[p].values())]

    take_step(poisoned=False)
    before = copy_state()
    take_step(poisoned=True)
    take_step(poisoned=True)
    assert all(torch.equal(a, b) for a, b in zip(before, copy_state(), strict=True))
    assert (int(step.bad_steps.consecutive), int(step.bad_steps.total)) == (2, 2)
    take_step(poisoned=False)
    assert (int(step.bad_steps.consecutive), int(step.bad_steps.total)) == (0, 2)
    assert not torch.equal(before[0], model.wte.weight)


def test_padding_rows_of_the_embedding_stay_zero() -> None:
    model = tiny_model()
    step = ClippedStep(make_optimizer(model, plan()), 1.0, torch.device("cpu"))
    x = torch.randint(0, 101, (4, 24))
    for _ in range(3):
        loss = model(x, x.roll(-1, 1))
        step.before_backward(0, 0, 1e-2, loss)
        loss.backward()
        step(loss)
    assert (model.wte.weight[101:] == 0).all() and (model.wte.weight[:101] != 0).any()
