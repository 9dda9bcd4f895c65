"""Token by token: which one is taken, for one text or several at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2box.errors import Damaged
from gpt2box.model.decoder import Decoder, KVCache


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. temperature 0: the likeliest; top_k 0 and top_p 1: no cut."""

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0


MIN_TEMPERATURE = 1e-6  # below it no other token has a chance, and quotients are no longer numbers


def sample_token(logits: Tensor, choice: SamplingParams, generator: torch.Generator) -> int:
    """A token from float32 logits (V,) on the CPU, where one seed gives one text on any device."""
    if not logits.isfinite().all():
        raise Damaged("the model's logits are not finite", "weights without NaN or infinity")
    if choice.temperature < MIN_TEMPERATURE:
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
def generate_batch(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    choice: SamplingParams,
    seeds: Sequence[int],
    stop_at: int | None = None,
) -> Iterator[list[int | None]]:
    """Yields a new token for each prompt as they come; None for one that came to `stop_at` before.

    Each text depends on its own seed; what else is written beside it changes its logits by rounding alone.

    Where a row fills the context, its newer half becomes the prompt of a fresh cache: positions are learned, so cached
    keys cannot be shifted, and half a context keeps the cost of that small.
    """
    model = decoder.model
    block_size, device = model.shape.block_size, model.wte.weight.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = [list(prompt[-block_size:]) for prompt in prompts]
    capacity = min(block_size, max(map(len, rows)) + max_new_tokens)
    cache = KVCache(model, len(rows), capacity)
    over = [False] * len(rows)
    new: Tensor | None = None
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if new is None or cache.length == capacity:
                rows = [row if len(row) <= block_size else row[-max(1, block_size // 2) :] for row in rows]
                new = prefill_inputs(cache, rows, device)
            logits = decoder(new, cache).float().cpu()  # (B, V)
            tokens: list[int | None] = []
            for row, row_logits in enumerate(logits):
                token = None if over[row] else sample_token(row_logits, choice, generators[row])
                over[row] = token is None or token == stop_at
                tokens.append(None if over[row] else token)
                rows[row].append(token or 0)
            if all(over):
                return
            yield tokens
            new = torch.tensor([[row[-1]] for row in rows], device=device)
    finally:
        model.train(was_training)


def prefill_inputs(cache: KVCache, rows: list[list[int]], device: torch.device) -> Tensor:
    """Empty the cache for these rows; returns their ids (B, t), shorter ones filled up at the beginning."""
    longest = max(map(len, rows))
    cache.length = 0
    padding = [longest - len(row) for row in rows]
    cache.padding = torch.tensor(padding, device=device) if any(padding) else None
    return torch.tensor([[0] * fill + row for fill, row in zip(padding, rows, strict=True)], device=device)


def generate(
    decoder: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    choice: SamplingParams,
    seed: int,
    stop_at: int | None = None,
) -> Iterator[int]:
    """Yields new tokens as they come, up to `stop_at` (left out) or max_new_tokens."""
    for (token,) in generate_batch(decoder, [prompt], max_new_tokens, choice, [seed], stop_at):
        assert token is not None
        yield token
