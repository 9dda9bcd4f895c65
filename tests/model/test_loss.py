"""The chunked loss matches PyTorch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpt2box.model.loss import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_loss_and_gradients_match_pytorch_in_float64(chunk: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(45, 16, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(128, 16, dtype=torch.float64, generator=generator).requires_grad_()  # 101 rows and padding
    targets = torch.randint(0, 101, (45,), generator=generator)
    targets[::4] = -1
    ours = chunked_cross_entropy(hidden, weight, targets, 101, chunk, scale)
    grads = torch.autograd.grad(ours, [hidden, weight])
    reference = scale * F.cross_entropy(hidden @ weight[:101].t(), targets, ignore_index=-1)
    expected = torch.autograd.grad(reference, [hidden, weight])
    assert abs(ours - reference) < 1e-13
    for found, reference_grad in zip(grads, expected, strict=True):
        assert (found - reference_grad).abs().max() < 1e-15
    assert (grads[1][101:] == 0).all() and (grads[0][::4] == 0).all()


def test_loss_is_zero_without_targets_and_finite_for_huge_logits() -> None:
    hidden, weight = torch.randn(8, 16).requires_grad_(), torch.randn(64, 16).requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, torch.full((8,), -1), 60, 4)
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()
    assert chunked_cross_entropy(hidden * 1e4, weight, torch.arange(8), 60, 4).isfinite()
