"""Token by token from a model, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2box.errors import Damaged
from gpt2box.model.gpt2 import GPT2, KeyValueCache


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen. temperature 0: the likeliest; top_k 0 and top_p 1: no cut."""

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0


def pick(logits: Tensor, choice: Choice, generator: torch.Generator) -> int:
    """A token from float32 logits (V,) on the CPU, where one seed gives one text on any device."""
    if not logits.isfinite().all():
        raise Damaged("the model's logits are not finite", "weights without NaN or infinity")
    if choice.temperature == 0:
        return int(logits.argmax())
    logits = logits / choice.temperature
    if 0 < choice.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(choice.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(0)
    if choice.top_p < 1:
        # The smallest set of likeliest tokens that holds top_p (Holtzman et al. 2020).
        ordered, order = probabilities.sort(descending=True, stable=True)
        beyond = ordered.cumsum(0) - ordered >= choice.top_p
        probabilities[order[beyond]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.inference_mode()
def generate(
    model: GPT2, prompt: list[int], max_new_tokens: int, choice: Choice, seed: int, stop_at: int | None = None
) -> Iterator[int]:
    """Yields new tokens as they come, up to `stop_at` (left out) or max_new_tokens.

    Where the context is full, the newer half of it becomes the prompt of a fresh cache: positions
    are learned, so cached keys cannot be shifted, and half a context keeps the cost of that small.
    """
    device, dtype = model.wte.weight.device, model.sums
    generator = torch.Generator().manual_seed(seed)
    block_size = model.shape.block_size
    was_training = model.training
    model.eval()
    try:
        ids = list(prompt[-block_size:])
        new = ids
        cache = KeyValueCache(model.shape, 1, device, dtype)
        for _ in range(max_new_tokens):
            if cache.length + len(new) > block_size:
                ids = ids[-max(1, block_size // 2) :]
                cache.length, new = 0, ids
            hidden = model.hidden(torch.tensor([new], device=device), cache)  # (1, t, C)
            token = pick(model.logits(hidden[0, -1]).float().cpu(), choice, generator)
            if token == stop_at:
                return
            yield token
            ids.append(token)
            new = [token]
    finally:
        model.train(was_training)
