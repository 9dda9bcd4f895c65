"""AdamW in less memory: exact where it says so, close where it does not, and the same bits after an interruption."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt2box.optim import low_memory_adamw
from gpt2box.optim.clipped_step import ClippedStep, make_optimizer_step
from gpt2box.optim.factory import make_optimizer
from gpt2box.optim.in_backward import InBackwardStep
from gpt2box.optim.low_memory_adamw import LowMemoryAdamW
from gpt2box.optim.quantization import code_values, dequantize, quantize, round_to_bfloat16
from tests.helpers.models import tiny_model
from tests.helpers.optimizers import batches, distance, generator, plan, trained


def test_a_step_inside_the_backward_pass_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_memory_adamw, "CHUNK", 1024)  # several chunks a tensor, the last not full
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
    assert distance(exact, trained(4, optimizer_in_backward="true")) < 1e-5  # of 4e-3 moved


def test_accumulating_in_the_averages_stays_near_accumulating_gradients() -> None:
    moved = distance(trained(0), trained(4, micro_steps=4))
    assert distance(trained(4, micro_steps=4), trained(4, micro_steps=4, optimizer_in_backward="true")) < moved


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer_states": "int8"},
        {"weights_dtype": "bfloat16"},
        {"optimizer_states": "int8", "weights_dtype": "bfloat16", "optimizer_in_backward": "true"},
    ],
)
def test_rungs_that_change_the_numbers_change_them_little(flags: dict[str, str]) -> None:
    plain, other, start = trained(8), trained(8, **flags), trained(0)
    apart = torch.cat([(a - b).flatten() for a, b in zip(plain, other, strict=True)]).norm()
    moved = torch.cat([(a - b).flatten() for a, b in zip(plain, start, strict=True)]).norm()
    assert 0 < apart < 0.6 * moved
    assert all(torch.equal(a, b) for a, b in zip(other, trained(8, **flags), strict=True))  # chance depends on the step


def test_gradients_are_freed_as_they_are_made() -> None:
    settings = plan(optimizer_in_backward="true", tokens_per_step="1024")
    model = tiny_model()
    update = make_optimizer_step(make_optimizer(model, settings), settings)
    alive: list[int] = []

    def look(parameter: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    (x,) = batches(1)
    loss = model(x, x.roll(-1, 1))
    update.before_backward(0, 0, 1e-3, loss)
    loss.backward()
    assert len(alive) == len(list(model.parameters())) and max(alive) == 0


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer_states": "int8", "optimizer_in_backward": "true"},
        {"optimizer_states": "int8"},
        {"optimizer": "muon"},
        {"optimizer": "muon", "optimizer_states": "int8", "weights_dtype": "bfloat16"},
    ],
    ids=["in backward", "int8", "muon", "muon in little memory"],
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_step_changes_nothing(flags: dict[str, str], bad: float) -> None:
    settings = plan(tokens_per_step="1024", **flags)
    model = tiny_model()
    model.cast_matrices(getattr(torch, settings.weights_dtype))
    optimizer = make_optimizer(model, settings)
    update = make_optimizer_step(optimizer, settings)
    assert isinstance(update, InBackwardStep if settings.optimizer_in_backward else ClippedStep)

    def one(step: int, factor: float) -> None:
        (x,) = batches(1)
        loss = model(x, x.roll(-1, 1)) * factor
        update.before_backward(step, 0, 1e-3, loss)
        loss.backward()
        update(loss)

    def everything() -> list[Tensor]:
        return [t.clone() for p in model.parameters() for t in (p, *optimizer.state[p].values())]

    one(0, 1.0)
    before = everything()
    one(1, bad)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert (int(update.bad_steps.consecutive), int(update.bad_steps.total)) == (1, 1)
    one(2, 1.0)
    after = everything()
    assert int(update.bad_steps.consecutive) == 0 and not torch.equal(before[0], after[0])
    assert all(tensor.isfinite().all() for tensor in after)


def test_a_large_gradient_is_held_to_grad_clip_tensor_by_tensor() -> None:
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
    for parameter, before in zip(model.parameters(), norms, strict=True):
        taken = optimizer.state[parameter]["exp_avg"].norm() / 0.1
        assert float(taken) == pytest.approx(min(before, 0.01), rel=1e-4)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_right_in_the_mean_and_near_in_each(signed: bool) -> None:
    assert len(code_values(signed, torch.device("cpu")).unique()) == 256
    values = torch.randn(1000, generator=generator()).double().exp().float()
    if signed:
        values *= torch.randn(1000, generator=generator()).sign()
    chance = generator()
    drawn = torch.stack([dequantize(*quantize(values, signed, chance), signed) for _ in range(400)])
    largest = torch.nn.functional.pad(values.abs(), (0, 24)).view(-1, 256).amax(1).repeat_interleave(256)[:1000]
    assert ((drawn - values).abs() / largest).max() < (0.015 if signed else 0.008)
    assert ((drawn.mean(0) - values).abs() / largest).max() < 0.002
    if signed:  # a block whose largest number is negative
        value = torch.tensor([-1.0, 0.3])
        for _ in range(100):
            value = dequantize(*quantize(value, True, chance), True)
        assert float(value[0]) == pytest.approx(-1.0, rel=1e-4)
    zeros, tiny = torch.zeros(300), torch.full((300,), 1e-30)
    assert not dequantize(*quantize(zeros, signed, chance), signed).any()
    assert signed or dequantize(*quantize(torch.cat([tiny, torch.ones(10)]), False, chance), False).all()


def test_bfloat16_is_right_in_the_mean() -> None:
    values = torch.tensor([1.001, -3.1415926, 1e-20, 0.0, 65_000.0])
    chance = generator()
    drawn = torch.stack([round_to_bfloat16(values, chance).float() for _ in range(4000)])
    assert torch.allclose(drawn.mean(0), values, rtol=2e-4)
    assert all(len(drawn[:, i].unique()) == (1 if values[i] == 0 else 2) for i in range(4))
