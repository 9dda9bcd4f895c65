"""The model's shape and the sizes that follow from it. Importable without torch."""

from collections.abc import Mapping
from dataclasses import dataclass

MAX_SIZES = {"n_layer": 1000, "n_head": 1000, "n_embd": 100_000, "block_size": 1_048_576, "vocab_size": 1_000_000}
GPT2_VOCAB_SIZE = 50_257
GPT2_PADDED_VOCAB_SIZE = 50_304  # rows in nanoGPT's checkpoints; those beyond the vocabulary stand for no token
VOCAB_PAD_MULTIPLE = 64  # tensor cores are faster on multiples of 64 (nanoGPT measured 50,304 against 50,257)
INT8_BLOCK_SIZE = 256  # int8 numbers that share a scale of 4 bytes


@dataclass(frozen=True)
class ModelShape:
    """The sizes of all tensors, and the variant of the architecture."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool = True
    gelu: str = "tanh"  # GPT-2's approximation; "none": exact, as in nanoGPT and Hugging Face's "gelu"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory. Checkpoints hold vocab_size rows."""
        return -(-self.vocab_size // VOCAB_PAD_MULTIPLE) * VOCAB_PAD_MULTIPLE

    @property
    def parameters(self) -> int:
        """Count parameters without padding; the embedding is tied to the output layer and counts once."""
        C = self.n_embd
        block = 12 * C * C + 2 * C + (11 * C if self.bias else 0)
        final = 2 * C if self.bias else C
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + final

    @property
    def block_matrix_parameters(self) -> int:
        """Count the weights of the blocks' matrices, which Muon updates."""
        return 12 * self.n_layer * self.n_embd**2

    def adapter_parameters(self, rank: int) -> int:
        """Count the parameters of LoRA adapters on a block's four matrices, of summed widths 16·C."""
        return self.n_layer * 16 * self.n_embd * rank

    def checkpoint_bytes(self, weights_dtype: str, optimizer: str, optimizer_states: str, lora_rank: int = 0) -> int:
        """Estimate a checkpoint's size on disk: the weights and their optimizer state.

        AdamW stores two numbers for each weight; Muon one for each weight of the blocks' matrices.
        """
        if lora_rank:
            return 4 * self.parameters + 12 * self.adapter_parameters(lora_rank)
        weight = 2 if weights_dtype == "bfloat16" else 4
        state = 1 + 4 / INT8_BLOCK_SIZE if optimizer_states == "int8" else 4
        states = 2 * self.parameters - (self.block_matrix_parameters if optimizer == "muon" else 0)
        return round(weight * self.parameters + state * states)

    @property
    def flops_per_token(self) -> int:
        """Count operations to train on one token: 6·N + 12·n_layer·n_embd·T (Chowdhery et al. 2022, appendix B)."""
        return 6 * self.parameters + 12 * self.n_layer * self.n_embd * self.block_size


def parse_sizes(values: Mapping[str, object]) -> dict[str, int]:
    """Extract ModelShape's sizes from a model's configuration. Raises ValueError: a size is missing or out of range."""
    for key, maximum in MAX_SIZES.items():
        size = values.get(key)
        if type(size) is not int or not 1 <= size <= maximum:
            raise ValueError(f"{key} is {repr(size)[:80] if key in values else 'missing'}, not 1 to {maximum:,}")
    sizes = {key: size for key in MAX_SIZES if isinstance(size := values[key], int)}
    if sizes["n_embd"] % sizes["n_head"]:
        raise ValueError(f"n_embd {sizes['n_embd']} is no multiple of n_head {sizes['n_head']}")
    return sizes
