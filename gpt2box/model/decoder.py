"""One token after another from a model: a step over a key/value cache, written out, with weights packed for it.

Generating a token reads every weight once and does little with it, so its time is that of the memory, and what counts
is how a product with one row (a matrix times a vector) reads its matrix. Measured on a CPU with AVX-512, one thread:

    float32, as nn.Linear keeps it      15 GB/s
    float32, transposed in memory       20 GB/s   the same numbers but for the order of sums
    float16 in FBGEMM's panels          28 GB/s   of half the bytes; activations and sums stay in float32
    int8 in FBGEMM's panels             24 GB/s   of a quarter; a scale a row, activations rounded to 8 bits as well

    B  rows: texts that are written together     t  new positions     S  positions in the cache
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2box.errors import BadInput
from gpt2box.model.gpt2 import GPT2, Block
from gpt2box.model.selective_recompute import linear

WEIGHT_FORMATS = ("float32", "float16", "int8")

Projection = Callable[[Tensor], Tensor]


class KVCache:
    """Keys and values of the positions so far, of rows that all end at the same place.

    A row that is shorter than the others begins with `padding` places that nothing looks at.
    """

    def __init__(self, model: GPT2, batch: int, capacity: int) -> None:
        shape = model.shape
        size = (shape.n_layer, 2, batch, shape.n_head, capacity, shape.n_embd // shape.n_head)
        self.store = torch.empty(
            size, device=model.wte.weight.device, dtype=model.residual_dtype
        )  # (n_layer, 2, B, H, S, D)
        self.length = 0
        self.padding: Tensor | None = None  # (B,), where any row has some

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values of the new positions, (B, H, t, D); returns those of all."""
        end = self.length + key.size(2)
        self.store[layer, 0, :, :, self.length : end] = key
        self.store[layer, 1, :, :, self.length : end] = value
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]

    def mask(self, new: int) -> Tensor | None:
        """Which places each new position looks at, (B, 1, t, S); None: all up to itself."""
        if self.padding is None:
            return None
        places = torch.arange(self.length + new, device=self.padding.device)
        visible = places[None, None, :] >= self.padding[:, None, None]  # (B, 1, S)
        up_to_itself = places[None, None, :] <= places[None, self.length :, None]  # (1, t, S)
        # A padding place looks at itself, lest its softmax be of nothing.
        itself = places[None, None, :] == places[None, self.length :, None]
        return (visible & up_to_itself | itself)[:, None]


@dataclass(frozen=True)
class DecoderLayer:
    """A block's norms and products."""

    ln_1: nn.LayerNorm
    c_attn: Projection
    attn_c_proj: Projection
    ln_2: nn.LayerNorm
    c_fc: Projection
    mlp_c_proj: Projection


class Decoder:
    """Logits of the next token of each row.

    `weights`: None for the model's as they are, or one of WEIGHTS; packed on a CPU, they leave the model empty.

    Raises:
        BadInput: weights that this device has not.
    """

    def __init__(self, model: GPT2, weights: str | None = None) -> None:
        self.model = model
        self.autocast = torch.autocast(model.wte.weight.device.type, torch.float16, enabled=False)
        make = {None: _plain, "float32": _transposed, "float16": _in_16_bits, "int8": _in_8_bits}[weights]
        self.output: Projection = model.logits
        if weights and model.wte.weight.device.type != "cpu":  # not verified on a GPU
            make = _plain
            if weights == "int8":
                raise BadInput("int8 weights on a GPU", "--weights float16, or --device cpu")
            if weights == "float16":
                model.cast_matrices(torch.float16)
                self.autocast = torch.autocast(model.wte.weight.device.type, torch.float16)
                self.output = lambda x: F.linear(x, model.wte.weight)[..., : model.shape.vocab_size]
        self.layers = []
        for module in model.h:
            block = cast(Block, module)
            attention = make(block.attn.c_attn), make(block.attn.c_proj)
            mlp = make(block.mlp.c_fc), make(block.mlp.c_proj)
            self.layers.append(DecoderLayer(block.ln_1, *attention, block.ln_2, *mlp))
        if weights in ("float16", "int8") and make is not _plain:
            output = nn.Linear(1, 1, bias=False)
            output.weight = nn.Parameter(model.wte.weight.detach()[: model.shape.vocab_size], requires_grad=False)
            self.output = make(output)
        elif make is _transposed:
            _transpose(model.wte)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) after new ids (B, t), which the cache takes in."""
        model = self.model
        new = ids.size(1)
        positions = torch.arange(cache.length, cache.length + new, device=ids.device)  # (t,)
        if cache.padding is not None:
            positions = (positions - cache.padding[:, None]).clamp(min=0)  # (B, t)
        mask = cache.mask(new)
        with self.autocast:
            x = model.wte(ids).to(model.residual_dtype) + model.wpe(positions).to(model.residual_dtype)  # (B, t, C)
            for index, layer in enumerate(self.layers):
                x = x + layer.attn_c_proj(self._attend(layer.c_attn(layer.ln_1(x)), index, cache, mask))
                x = x + layer.mlp_c_proj(F.gelu(layer.c_fc(layer.ln_2(x)), approximate=model.shape.gelu))
            cache.length += new
            return self.output(model.ln_f(x[:, -1]))

    def _attend(self, projected: Tensor, index: int, cache: KVCache, mask: Tensor | None) -> Tensor:
        """Of c_attn's output (B, t, 3 · C); returns (B, t, C)."""
        B, new, C = projected.size(0), projected.size(1), projected.size(2) // 3
        heads = projected.to(self.model.residual_dtype).view(B, new, 3, self.model.shape.n_head, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, t, D)
        key, value = cache.extend(index, key, value)
        # Several new positions begin an empty cache; a single one sees all.
        y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None and new > 1)
        return y.transpose(1, 2).reshape(B, new, C)


def _plain(layer: nn.Linear) -> Projection:
    return lambda x: linear(x, layer)


def _transpose(layer: nn.Linear | nn.Embedding) -> None:
    """Lay a matrix out by columns; it stays the same matrix."""
    layer.weight.data = layer.weight.data.t().contiguous().t()


def _transposed(layer: nn.Linear) -> Projection:
    _transpose(layer)
    return lambda x: linear(x, layer)


def _in_16_bits(layer: nn.Linear) -> Projection:
    packed = torch.ops.quantized.linear_prepack_fp16(layer.weight.detach().float(), layer.bias)
    layer.weight.data = torch.empty(0)
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def _in_8_bits(layer: nn.Linear) -> Projection:
    weight = layer.weight.detach().float()
    scales = weight.abs().amax(1).clamp(min=1e-12) / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these functions will go; the locks' versions have them
        zeros = torch.zeros(len(scales), dtype=torch.long)
        rounded = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(rounded, layer.bias)
    layer.weight.data = torch.empty(0)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)
