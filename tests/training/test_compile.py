"""The compiled training step, made by Inductor itself for the CPU, against the eager one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpt2box.model.gpt2 import GPT2
from gpt2box.model.shape import ModelShape
from gpt2box.training.model_setup import compile_model

# More rows than the loss takes at a time (VOCAB_CHUNK), so that it forms the embedding's gradient in two parts.
SHAPE = ModelShape(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=17_000)
CHUNKS = 4


def loss_and_gradients(
    forward: Callable[..., Tensor], model: GPT2, ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-step as training does it."""
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16, cache_enabled=False):
        loss = forward(ids[:, :-1], ids[:, 1:], 0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_step_equals_eager_step_over_several_loss_chunks(mode: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = GPT2(SHAPE)
    model.init_weights(0)
    model.train()
    micro_batch_size = 4
    model.activation_checkpointing = mode
    model.loss_chunk_tokens = micro_batch_size * SHAPE.block_size // CHUNKS
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SHAPE.vocab_size, (micro_batch_size, SHAPE.block_size + 1), generator=generator)
    loss, expected = loss_and_gradients(model, model, ids, dtype)
    compiled_loss, gradients = loss_and_gradients(compile_model(model), model, ids, dtype)
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5  # two units of bfloat16's last place
    assert abs(compiled_loss - loss) <= rounding
    assert gradients.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference <= 4 * rounding, (name, float(difference))
