"""8-bit quantization: a code per number, a scale per block of 256 (Dettmers et al. 2022, arXiv:2110.02861).

Codes are dense near zero and sparse near the block's maximum: seven decades, each with twice as many codes as the
decade below. Rounding is stochastic, so that a moment that changes by less than the distance of two codes still moves
correctly on average. torchao and bitsandbytes round to nearest, need a compiler or a GPU, and cannot be tested on both
of our software stacks.
"""

import functools

import torch
from torch import Tensor

from gpt2box.model.shape import INT8_BLOCK_SIZE

BLOCK = INT8_BLOCK_SIZE
DECADES = 7


@functools.cache
def code_values(signed: bool, device: torch.device) -> Tensor:
    """Return the values of the 256 codes, ascending, in [-1, 1] or [0, 1]; float32."""
    decades = []
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float64)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - DECADES + 1))
    positive = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    values = torch.cat([-positive, ends, positive] if signed else [ends, positive])
    return values.sort().values.float().to(device)


def quantize(values: Tensor, signed: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Quantize float32 values (n,) to codes (n,) uint8 and scales (⌈n / 256⌉,) float32.

    Unsigned values above 0 never become 0.
    """
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    table = code_values(signed, values.device)
    scales = scales / -table[0] if signed else scales  # the lowest code is slightly above -1
    x = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).flatten()[:count]
    above = torch.bucketize(x, table, out_int32=True).clamp_(min=1, max=255)
    low, high = table[above - 1], table[above]
    random = torch.rand(count, generator=generator, device=values.device)
    codes = above - (random * (high - low) >= x - low).int()
    if not signed:
        codes = torch.maximum(codes, (x > 0).int())
    return codes.to(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Return the float32 values (n,) of codes (n,) and scales (⌈n / 256⌉,)."""
    values = code_values(signed, codes.device)[codes.int()]
    return values * scales.repeat_interleave(BLOCK)[: codes.numel()]


def round_to_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 stochastically: up or down with a chance proportional to nearness, exact on average."""
    low_bits = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, generator=generator, device=values.device)
    return (values.view(torch.int32) + low_bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
