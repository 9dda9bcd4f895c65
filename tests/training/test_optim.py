"""The step: clipping, non-finite gradients, decay, schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpt2box.config import loader
from gpt2box.optim.clipped_step import ClippedStep
from gpt2box.optim.factory import make_optimizer
from gpt2box.optim.schedule import learning_rate_at
from tests.helpers.models import tiny_model
from tests.helpers.optimizers import plan, planned


def test_a_clipped_step_is_pytorchs_own() -> None:
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
        assert (a - b).abs().max() < 1e-5  # of 3e-3 moved


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_non_finite_step_reaches_neither_weights_nor_averages(bad: float, where: str) -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, plan())
    step = ClippedStep(optimizer, 1.0, torch.device("cpu"))
    x = torch.randint(0, 101, (4, 24))

    def one(spoil: bool) -> None:
        loss = model(x, x.roll(-1, 1))
        step.before_backward(0, 0, 1e-3, loss)
        loss.backward()
        if spoil and where == "gradient":
            model.wpe.weight.grad[3, 3] = bad
        step(loss * bad if spoil and where == "loss" else loss)

    def everything() -> list[torch.Tensor]:
        return [t.clone() for p in model.parameters() for t in (p, *optimizer.state[p].values())]

    one(spoil=False)
    before = everything()
    one(spoil=True)
    one(spoil=True)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert (int(step.bad_steps.consecutive), int(step.bad_steps.total)) == (2, 2)
    one(spoil=False)
    assert (int(step.bad_steps.consecutive), int(step.bad_steps.total)) == (0, 2)
    assert not torch.equal(before[0], model.wte.weight)


def test_only_matrices_decay() -> None:
    model = tiny_model()
    groups = make_optimizer(model, plan(weight_decay="0.3")).param_groups
    decayed = {id(p) for p in groups[0]["params"]}
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (
            name.endswith("weight") and ".ln_" not in name and name != "ln_f.weight"
        ), name


def test_padding_rows_stay_zero_through_steps() -> None:
    model = tiny_model()
    step = ClippedStep(make_optimizer(model, plan()), 1.0, torch.device("cpu"))
    x = torch.randint(0, 101, (4, 24))
    for _ in range(3):
        loss = model(x, x.roll(-1, 1))
        step.before_backward(0, 0, 1e-2, loss)
        loss.backward()
        step(loss)
    assert (model.wte.weight[101:] == 0).all() and (model.wte.weight[:101] != 0).any()


@pytest.mark.parametrize(
    ("schedule", "middle"), [("cosine", 5.5e-4), ("linear", 5.5e-4), ("constant", 1e-3), ("constant-linear", 1e-3)]
)
def test_the_learning_rate_rises_and_falls(schedule: str, middle: float) -> None:
    p = plan(learning_rate="1e-3", min_lr="1e-4", lr_schedule=schedule)
    assert learning_rate_at(0, p) == pytest.approx(1e-5)
    assert learning_rate_at(99, p) == pytest.approx(1e-3) == learning_rate_at(100, p)
    assert learning_rate_at(550, p) == pytest.approx(middle)
    assert learning_rate_at(1000, p) == pytest.approx(1e-3 if schedule == "constant" else 1e-4)
    assert learning_rate_at(5000, p) == learning_rate_at(1000, p)
    if schedule == "constant-linear":
        assert learning_rate_at(800, p) == pytest.approx(1e-3) and learning_rate_at(900, p) == pytest.approx(5.5e-4)


def test_what_is_left_out_is_derived_once() -> None:
    p = plan()
    assert p.min_lr == pytest.approx(p.learning_rate / 10) and p.decay_steps == p.max_steps
    derived = planned(loader.load(None, {"dataset": "x", "max_steps": "5000"})[0], p.shape, 1)
    assert derived.warmup_steps == 100 and derived.save_interval == derived.eval_interval
    assert derived.grad_accum_steps * derived.micro_batch_size == derived.sequences_per_step == 64
    assert learning_rate_at(0, replace(p, warmup_steps=0)) == pytest.approx(p.learning_rate)
