"""Muon: its updates, optimizer state, gradient accumulation, and the settings it excludes."""

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


def train_with_muon(model: GPT2, steps: int = 1, **flags: str) -> Muon:
    """Take some steps with Muon; returns the optimizer."""
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
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * torch.logspace(0, -1, shape[2])
    U, S, V = torch.linalg.svd(x.double(), full_matrices=False)
    result = orthogonalize(x, dtype).double()
    assert (S[:, 0] / S[:, -1]).min() > 5
    diagonal = (U.mT @ result @ V.mT).diagonal(dim1=-2, dim2=-1)
    large = S / S[:, :1] > 0.02  # smaller singular values need another step
    assert diagonal[large].min() > 0.8 and diagonal.max() < 1.2
    assert not orthogonalize(torch.zeros(shape), dtype).any()


def test_the_first_update_moves_each_row_equally_and_decays_the_weights() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_with_muon(model, weight_decay="0.3")
    for name, parameter in model.named_parameters():
        if name.startswith("h.") and parameter.dim() == 2:
            moved = before[name] * (1 - 3e-4) - parameter.detach()
            rows = moved.square().mean(1).sqrt()
            assert torch.allclose(rows, torch.tensor(2e-4), rtol=0.01), name  # UPDATE_RMS × the learning rate


def test_queries_keys_and_values_are_orthogonalized_separately() -> None:
    model = tiny_model()
    weight = model.h[0].attn.c_attn.weight
    separate = [torch.nn.Parameter(part.clone()) for part in weight.detach().chunk(3)]
    reference = Muon(
        [{"params": separate, "weight_decay": 0.1, "stacked": 1}], 1e-3, (0.9, 0.95), "float32", 0, torch.float32
    )
    settings = plan(optimizer="muon", tokens_per_step="1024", grad_clip="0")
    update = make_optimizer_step(make_optimizer(model, settings), settings)
    for step, x in enumerate(batches(3)):
        loss = model(x, x.roll(-1, 1))
        update.before_backward(step, 0, 1e-3, loss)
        loss.backward()
        assert weight.grad is not None
        for part, gradient in zip(separate, weight.grad.chunk(3), strict=True):
            part.grad = gradient.clone()
        reference.begin_step(step)
        reference.step()
        update(loss)
    assert torch.allclose(torch.cat(separate), weight, atol=1e-6)  # the weights moved by 3e-3


def test_the_state_has_one_number_per_weight_inside_the_blocks_and_two_elsewhere() -> None:
    model = tiny_model()
    optimizer = train_with_muon(model)
    for name, parameter in model.named_parameters():
        in_block = name.startswith("h.") and parameter.dim() == 2
        numbers = sum(tensor.numel() for tensor in optimizer.state[parameter].values()) - 1  # without `step`
        assert numbers == (parameter.numel() + parameter.size(0) if in_block else 2 * parameter.numel())


def test_gradient_accumulation_equals_a_larger_batch() -> None:
    def train_micro_batches(micro_batch: int) -> list[Tensor]:
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

    assert distance(train_micro_batches(4), train_micro_batches(1)) < 1e-4  # the weights moved by 3e-3


@pytest.mark.parametrize("flags", [{"optimizer_states": "int8"}, {"weights_dtype": "bfloat16"}])
def test_low_memory_settings_stay_close_and_are_deterministic(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (low_memory_adamw, muon):
        monkeypatch.setattr(module, "CHUNK", 1024)  # several chunks per matrix
    full, low_memory, start = (trained(n, optimizer="muon", **more) for n, more in ((8, {}), (8, flags), (0, {})))
    difference = torch.cat([(a - b).flatten() for a, b in zip(full, low_memory, strict=True)]).norm()
    moved = torch.cat([(a - b).flatten() for a, b in zip(full, start, strict=True)]).norm()
    assert 0 < difference < 0.6 * moved
    again = trained(8, optimizer="muon", **flags)
    assert all(torch.equal(a, b) for a, b in zip(low_memory, again, strict=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"optimizer_in_backward": "true"}, "optimizer: found muon with optimizer_in_backward; expected adamw"),
        ({"lora_rank": "8", "init_from": "gpt2"}, "optimizer: found muon with lora_rank; expected adamw"),
        ({"optimizer": "nuon"}, "expected [adamw|muon]"),
    ],
)
def test_incompatible_settings_are_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput) as raised:
        loader.load_config(None, {"dataset": "x", "optimizer": "muon", **flags})
    assert message in str(raised.value)
