"""The decoder's logits are those of the full forward pass."""

from __future__ import annotations

import copy

import pytest
import torch

from gpt2box.model.decoder import Decoder, KVCache
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.sampling import pad_prompts
from tests.helpers.models import tiny_model

UNEVEN_PROMPTS = [[5, 99, 0, 41, 23], [64, 2], [17, 8, 91, 33, 50, 72, 1, 100, 12, 6], [7]]


def full_forward_logits(model: GPT2, row: list[int]) -> torch.Tensor:
    return model.logits(model.hidden_states(torch.tensor([row]))[0, -1])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights, error", [(None, 1e-5), ("float32", 1e-5), ("float16", 5e-3), ("int8", 0.1)])
@torch.inference_mode()
def test_logits_of_each_step_match_the_full_forward_pass(bias: bool, weights: str | None, error: float) -> None:
    model = tiny_model(bias)
    decoder = Decoder(copy.deepcopy(model), weights)
    cache = KVCache(model, len(UNEVEN_PROMPTS), 24)
    rows = [list(row) for row in UNEVEN_PROMPTS]
    new = pad_prompts(cache, rows, torch.device("cpu"))
    for step in range(8):
        logits = decoder(new, cache)
        expected = torch.stack([full_forward_logits(model, row) for row in rows])
        assert (logits - expected).abs().max() < error * expected.std(), step
        for row in rows:
            row.append((row[-1] * 7 + step) % 101)
        new = torch.tensor([[row[-1]] for row in rows])
