"""Generation of text token by token, for one prompt or several at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2box.config.sampling_defaults import TEMPERATURE, TOP_K, TOP_P
from gpt2box.errors import Damaged
from gpt2box.model.decoder import Decoder, KVCache


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled. temperature 0 takes the most likely; top_k 0 and top_p 1 exclude no token."""

    temperature: float = TEMPERATURE
    top_k: int = TOP_K
    top_p: float = TOP_P


MIN_TEMPERATURE = 1e-6  # below it, only the most likely token has a chance, and logits / temperature overflows


def sample_token(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Sample a token from float32 logits (V,) on the CPU, where a seed gives the same text for any device.

    Raises Damaged: a logit is not finite.
    """
    if not logits.isfinite().all():
        raise Damaged("the model's logits are not finite", "weights without NaN or infinity")
    if params.temperature < MIN_TEMPERATURE:
        return int(logits.argmax())
    logits = logits / params.temperature
    if 0 < params.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(0)
    if params.top_p < 1:
        # Keep the smallest set of the most likely tokens with a total of top_p (Holtzman et al. 2020).
        ordered, order = probabilities.sort(descending=True, stable=True)
        excluded = ordered.cumsum(0) - ordered >= params.top_p
        probabilities[order[excluded]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.inference_mode()
def generate_batch(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    params: SamplingParams,
    seeds: Sequence[int],
    stop_at: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield a new token for each prompt at a time; None for a prompt that has reached `stop_at`.

    Each text depends on its own seed only; the other texts change its logits by rounding.

    If a row fills the context, its newer half becomes the prompt of an empty cache: positions are learned, so cached
    keys cannot be shifted, and half a context keeps the cost of that small.
    """
    model = decoder.model
    block_size, device = model.shape.block_size, model.wte.weight.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = [list(prompt[-block_size:]) for prompt in prompts]
    capacity = min(block_size, max(map(len, rows)) + max_new_tokens)
    cache = KVCache(model, len(rows), capacity)
    is_done = [False] * len(rows)
    new: Tensor | None = None
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if new is None or cache.length == capacity:
                rows = [row if len(row) <= block_size else row[-max(1, block_size // 2) :] for row in rows]
                new = pad_prompts(cache, rows, device)
            logits = decoder(new, cache).float().cpu()  # (B, V)
            tokens: list[int | None] = []
            for row, row_logits in enumerate(logits):
                token = None if is_done[row] else sample_token(row_logits, params, generators[row])
                is_done[row] = token is None or token == stop_at
                tokens.append(None if is_done[row] else token)
                rows[row].append(token or 0)
            if all(is_done):
                return
            yield tokens
            new = torch.tensor([[row[-1]] for row in rows], device=device)
    finally:
        model.train(was_training)


def pad_prompts(cache: KVCache, rows: list[list[int]], device: torch.device) -> Tensor:
    """Empty the cache and set its padding for these rows; returns their ids (B, t), padded at the beginning."""
    longest = max(map(len, rows))
    cache.length = 0
    padding = [longest - len(row) for row in rows]
    cache.padding = torch.tensor(padding, device=device) if any(padding) else None
    return torch.tensor([[0] * count + row for count, row in zip(padding, rows, strict=True)], device=device)


def generate(
    decoder: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    params: SamplingParams,
    seed: int,
    stop_at: int | None = None,
) -> Iterator[int]:
    """Yield new tokens as they are sampled, up to max_new_tokens or before `stop_at`."""
    for (token,) in generate_batch(decoder, [prompt], max_new_tokens, params, [seed], stop_at):
        assert token is not None
        yield token
