"""Fingerprints of weights and optimizer state: they tell if two runs, or two attempts at one, are bit-identical."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpt2box.distributed.fsdp import local_shard, sum_over_shards
from gpt2box.model.gpt2 import GPT2

MULTIPLIER = 0x9E3779B97F4A7C15  # odd, with well-mixed bits: 2⁶⁴ over the golden ratio (Knuth, volume 3, 6.4)


@torch.no_grad()
def fingerprint_run_state(model: GPT2, optimizer: torch.optim.Optimizer) -> str:
    """Return 16 hexadecimal digits that depend on each bit of weights and optimizer state. Waits for the device.

    The bits of each tensor are summed as 64-bit integers, in which order has no effect; each sum is multiplied by a
    factor of its own. A difference of one bit always shows; swapped elements of a tensor do not. Each rank sums its
    rows of sharded tensors, and all ranks get the same result.
    """
    sums = torch.stack([sum_bits(local_shard(tensor)) for tensor in trained_tensors(model, optimizer)])
    # The low 64 bits of each product, as a signed integer.
    factors = [((2 * index + 1) * MULTIPLIER + 2**63) % 2**64 - 2**63 for index in range(len(sums))]
    total = sum_over_shards((sums * torch.tensor(factors, device=sums.device)).sum(), model)
    return f"{int(total) % 2**64:016x}"


def trained_tensors(model: GPT2, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the trainable parameters, each followed by its optimizer state without the step."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter
            state = optimizer.state.get(parameter, {})
            yield from (value for key, value in state.items() if isinstance(value, Tensor) and key != "step")


def sum_bits(tensor: Tensor) -> Tensor:
    """Sum the bits as 64-bit integers, or bytes if the size is not a multiple; an int64 scalar, modulo 2⁶⁴."""
    flat = tensor.detach().reshape(-1)
    fits_int64 = flat.nbytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    return flat.view(torch.int64).sum() if fits_int64 else flat.view(torch.uint8).sum(dtype=torch.int64)


def fingerprint_files(files: dict[str, dict[str, Any]]) -> str:
    """Return the sha256 over the names and sha256 of a checkpoint's safetensors files."""
    lines = [f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items()) if name.endswith(".safetensors")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
