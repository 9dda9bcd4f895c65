"""Short names of all that a run has learned: whether two runs, or two attempts at one, are in the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpt2box.distributed.fsdp import local, sum_over_ranks
from gpt2box.model.gpt2 import GPT2

TENSORS = ".safetensors"
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, its bits well mixed: 2⁶⁴ over the golden ratio (Knuth, volume 3, 6.4)


@torch.no_grad()
def checksum(model: GPT2, optimizer: torch.optim.Optimizer) -> str:
    """Of the bits of weights and averages, 16 hexadecimal digits; waits for the device.

    The bits are added up as whole numbers of 64 bits, whose sum no order changes, each tensor's sum is multiplied by
    a number of its own. One bit of difference always shows; not shown is what only trades places within a tensor. Of
    tensors that are split over ranks each adds up its rows; all come to the same.
    """
    sums = torch.stack([sum_of_bits(local(tensor)) for tensor in learned(model, optimizer)])
    factors = [signed((2 * index + 1) * MULTIPLIER) for index in range(len(sums))]
    total = sum_over_ranks((sums * torch.tensor(factors, device=sums.device)).sum(), model)
    return f"{int(total) % 2**64:016x}"


def learned(model: GPT2, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Weights that are trained, each followed by what the optimizer keeps of it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter
            state = optimizer.state.get(parameter, {})
            yield from (value for key, value in state.items() if isinstance(value, Tensor) and key != "step")


def sum_of_bits(tensor: Tensor) -> Tensor:
    """As whole numbers of 64 bits, or of 8 where these do not fit in; an int64 scalar, modulo 2⁶⁴."""
    flat = tensor.detach().reshape(-1)
    whole = flat.nbytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    return flat.view(torch.int64).sum() if whole else flat.view(torch.uint8).sum(dtype=torch.int64)


def signed(number: int) -> int:
    """The 64 low bits as an int64."""
    return (number + 2**63) % 2**64 - 2**63


def digest_of(files: dict[str, dict[str, Any]]) -> str:
    """sha256 over the names and sha256 of a checkpoint's tensor files: weights, averages and adapters."""
    lines = [f"{name} {about['sha256']}\n" for name, about in sorted(files.items()) if name.endswith(TENSORS)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
