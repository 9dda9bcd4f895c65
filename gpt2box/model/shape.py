"""The shape of a network and the counts that follow from it. Importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LARGEST = {"n_layer": 1000, "n_head": 1000, "n_embd": 100_000, "block_size": 1_048_576, "vocab_size": 1_000_000}
PAD_TO = 64  # vocabulary rows: matrix units want multiples of 64 (nanoGPT measured 50,304 against 50,257)

EIGHT_BIT_BLOCK = 256  # numbers in 8 bits that share a scale of 4 bytes


@dataclass(frozen=True)
class ModelShape:
    """All that decides the size of each tensor, and which function the network is."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool = True
    gelu: str = "tanh"  # GPT-2's; "none" for the exact one, as nanoGPT and Hugging Face's "gelu" have it

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory; on disk there are vocab_size."""
        return -(-self.vocab_size // PAD_TO) * PAD_TO

    @property
    def parameters(self) -> int:
        """Parameters without padding; the embedding, which is also the output layer, counts once."""
        C = self.n_embd
        block = 12 * C * C + 2 * C + (11 * C if self.bias else 0)
        final = 2 * C if self.bias else C
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + final

    def adapter_parameters(self, rank: int) -> int:
        """Of adapters (model/lora.py) on a block's four products, whose widths in and out add up to 16·C."""
        return self.n_layer * 16 * self.n_embd * rank

    def checkpoint_bytes(self, weights_dtype: str, optimizer: str, optimizer_states: str, lora_rank: int = 0) -> int:
        """Size of a checkpoint on disk: weights and averages, two of each or with Muon one inside the blocks."""
        if lora_rank:
            return 4 * self.parameters + 12 * self.adapter_parameters(lora_rank)
        weight = 2 if weights_dtype == "bfloat16" else 4
        average = 1 + 4 / EIGHT_BIT_BLOCK if optimizer_states == "int8" else 4
        averages = 2 * self.parameters - (12 * self.n_layer * self.n_embd**2 if optimizer == "muon" else 0)
        return round(weight * self.parameters + average * averages)

    @property
    def flops_per_token(self) -> int:
        """Operations to train on one token: 6·N + 12·n_layer·n_embd·T (Chowdhery et al. 2022, appendix B)."""
        return 6 * self.parameters + 12 * self.n_layer * self.n_embd * self.block_size


def sizes_of(values: Mapping[str, object]) -> dict[str, int]:
    """ModelShape's sizes among what a file says of a network.

    Raises:
        ValueError: one of them is missing, or no network has it.
    """
    for key, most in LARGEST.items():
        size = values.get(key)
        if type(size) is not int or not 1 <= size <= most:
            raise ValueError(f"{key} is {repr(size)[:80] if key in values else 'missing'}, not 1 to {most:,}")
    sizes = {key: size for key in LARGEST if isinstance(size := values[key], int)}
    if sizes["n_embd"] % sizes["n_head"]:
        raise ValueError(f"n_embd {sizes['n_embd']} is no multiple of n_head {sizes['n_head']}")
    return sizes
