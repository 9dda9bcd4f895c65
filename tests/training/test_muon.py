"""Muon: what an update is, what reaches the weights, what is kept, and what it cannot be combined with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt2box.config import loader
from gpt2box.errors import BadInput
from gpt2box.model.gpt2 import GPT2
from gpt2box.optim import low_memory_adamw, muon
from gpt2box.optim.clipped_step import make_optimizer_step
from gpt2box.optim.factory import make_optimizer
from gpt2box.optim.muon import Muon, orthogonalize
from tests.helpers.models import tiny_model
from tests.helpers.optimizers import batches, distance, plan, trained


def stepped(model: GPT2, steps: int = 1, **flags: str) -> Muon:
    """A model after some steps with Muon."""
    settings = plan(optimizer="muon", tokens_per_step="1024", **flags)
    optimizer = make_optimizer(model, settings)
    assert isinstance(optimizer, Muon)
    update = make_optimizer_step(optimizer, settings)
    for step, x in enumerate(batches(steps)):
        loss = model(x, x.roll(-1, 1))
        update.before_backward(step, 0, 1e-3, loss)
        loss.backward()
        update(loss)
    return optimizer


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 96, 32), (1, 32, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_direction_of_an_update_counts_as_much(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * torch.logspace(0, -1, shape[2])
    U, S, V = torch.linalg.svd(x.double(), full_matrices=False)
    found = orthogonalize(x, dtype).double()
    assert (S[:, 0] / S[:, -1]).min() > 5
    along = (U.mT @ found @ V.mT).diagonal(dim1=-2, dim2=-1)
    clear = S / S[:, :1] > 0.02  # smaller ones would take a step more
    assert along[clear].min() > 0.8 and along.max() < 1.2
    assert not orthogonalize(torch.zeros(shape), dtype).any()


def test_a_first_update_moves_every_row_by_the_same_and_decays_the_weights() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepped(model, weight_decay="0.3")
    for name, parameter in model.named_parameters():
        if name.startswith("h.") and parameter.dim() == 2:
            moved = before[name] * (1 - 3e-4) - parameter.detach()
            rows = moved.square().mean(1).sqrt()
            assert torch.allclose(rows, torch.tensor(2e-4), rtol=0.01), name  # UPDATE_RMS × the learning rate


def test_queries_keys_and_values_are_matrices_of_their_own() -> None:
    model = tiny_model()
    weight = model.h[0].attn.c_attn.weight
    parts = [torch.nn.Parameter(part.clone()) for part in weight.detach().chunk(3)]
    alone = Muon([{"params": parts, "weight_decay": 0.1, "stacked": 1}], 1e-3, (0.9, 0.95), "float32", 0, torch.float32)
    settings = plan(optimizer="muon", tokens_per_step="1024", grad_clip="0")
    update = make_optimizer_step(make_optimizer(model, settings), settings)
    for step, x in enumerate(batches(3)):
        loss = model(x, x.roll(-1, 1))
        update.before_backward(step, 0, 1e-3, loss)
        loss.backward()
        assert weight.grad is not None
        for part, gradient in zip(parts, weight.grad.chunk(3), strict=True):
            part.grad = gradient.clone()
        alone.begin_step(step)
        alone.step()
        update(loss)
    assert torch.allclose(torch.cat(parts), weight, atol=1e-6)  # of 3e-3 moved


def test_one_number_is_kept_for_a_weight_inside_the_blocks_and_two_elsewhere() -> None:
    model = tiny_model()
    optimizer = stepped(model)
    for name, parameter in model.named_parameters():
        inside = name.startswith("h.") and parameter.dim() == 2
        kept = sum(tensor.numel() for tensor in optimizer.state[parameter].values()) - 1  # the step
        assert kept == (parameter.numel() + parameter.size(0) if inside else 2 * parameter.numel())


def test_accumulating_gradients_is_a_larger_batch() -> None:
    def after(micro_batch: int) -> list[Tensor]:
        model = tiny_model(bias=False)
        settings = plan(optimizer="muon", block_size="24", micro_batch_size=str(micro_batch), tokens_per_step="96")
        update = make_optimizer_step(make_optimizer(model, settings), settings)
        for step, x in enumerate(batches(3)):
            total = torch.zeros(())
            for part in x.split(micro_batch):
                loss = model(part, part.roll(-1, 1), micro_batch / 4)
                update.before_backward(step, 0, 1e-3, loss)
                loss.backward()
                total += loss.detach()
            update(total)
        return [p.detach().double() for p in model.parameters()]

    assert distance(after(4), after(1)) < 1e-4  # of 3e-3 moved


@pytest.mark.parametrize("flags", [{"optimizer_states": "int8"}, {"weights_dtype": "bfloat16"}])
def test_low_memory_changes_the_numbers_little_and_by_seed_alone(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (low_memory_adamw, muon):
        monkeypatch.setattr(module, "CHUNK", 1024)  # several chunks a matrix
    plain, other, start = (trained(n, optimizer="muon", **more) for n, more in ((8, {}), (8, flags), (0, {})))
    apart = torch.cat([(a - b).flatten() for a, b in zip(plain, other, strict=True)]).norm()
    moved = torch.cat([(a - b).flatten() for a, b in zip(plain, start, strict=True)]).norm()
    assert 0 < apart < 0.6 * moved
    again = trained(8, optimizer="muon", **flags)
    assert all(torch.equal(a, b) for a, b in zip(other, again, strict=True))


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"optimizer_in_backward": "true"}, "optimizer: found muon with optimizer_in_backward; expected adamw"),
        ({"lora_rank": "8", "init_from": "gpt2"}, "optimizer: found muon with lora_rank; expected adamw"),
        ({"optimizer": "nuon"}, "expected [adamw|muon]"),
    ],
)
def test_what_it_cannot_be_combined_with_is_said(flags: dict[str, str], part: str) -> None:
    with pytest.raises(BadInput) as fault:
        loader.load(None, {"dataset": "x", "optimizer": "muon", **flags})
    assert part in str(fault.value)
