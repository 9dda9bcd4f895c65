"""Numbers in 8 bits: a code for each, a scale for each block of 256 (Dettmers et al. 2022, arXiv:2110.02861).

The codes lie close together near zero and far apart near the block's largest number: seven decades, with twice as many
codes in each as in the one below. Rounding is stochastic, up or down by chance in proportion to nearness, so that an
average that changes by less than a code's distance still moves, in the mean as it should. torchao's and bitsandbytes'
versions round to nearest, need a compiler or a GPU, and cannot be tested on both of our stacks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gpt2box.model.shape import EIGHT_BIT_BLOCK

BLOCK = EIGHT_BIT_BLOCK
DECADES = 7


@functools.cache
def codes(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers that a code stands for, ascending, in [-1, 1] or [0, 1], float32."""
    positive = []
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float64)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - DECADES + 1))
    above = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    every = torch.cat([-above, ends, above] if signed else [ends, above])
    return every.sort().values.float().to(device)


def quantise(values: Tensor, signed: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Float32 values (n,) as codes (n,) uint8 and scales (⌈n / 256⌉,) float32. Unsigned: above 0 never becomes 0."""
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    table = codes(signed, values.device)
    scales = scales / -table[0] if signed else scales  # the lowest code is not quite -1
    x = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).flatten()[:count]
    above = torch.bucketize(x, table, out_int32=True).clamp_(min=1, max=255)
    low, high = table[above - 1], table[above]
    chance = torch.rand(count, generator=generator, device=values.device)
    code = above - (chance * (high - low) >= x - low).int()
    if not signed:
        code = torch.maximum(code, (x > 0).int())
    return code.to(torch.uint8), scales


def dequantise(code: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The reverse: float32 (n,)."""
    values = codes(signed, code.device)[code.int()]
    return values * scales.repeat_interleave(BLOCK)[: code.numel()]


def round_to_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 to bfloat16, up or down by chance in proportion to nearness: right in the mean."""
    low_bits = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, generator=generator, device=values.device)
    return (values.view(torch.int32) + low_bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
