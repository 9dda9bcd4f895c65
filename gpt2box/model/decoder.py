"""Next-token logits over a key/value cache, with weights packed for the products with one row.

Generating a token reads every weight once and computes little, so its time is that of the memory: what counts is how a
matrix-vector product reads its matrix. Measured on a CPU with AVX-512, one thread:

    float32, as nn.Linear stores it     15 GB/s
    float32, transposed in memory       20 GB/s   the same results but for the order of summation
    float16 in FBGEMM's panels          28 GB/s   half the bytes; activations and sums stay float32
    int8 in FBGEMM's panels             24 GB/s   a quarter of the bytes; a scale per row, activations rounded to 8 bits

    B  rows: texts generated together     t  new positions     S  positions in the cache
    C  n_embd     H  heads     D  C / H     V  vocab_size
"""

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

Projection = Callable[[Tensor], Tensor]


class KVCache:
    """Keys and values of the positions so far, for rows that all end at the same position.

    A shorter row begins with `padding` positions that no other position attends to.
    """

    def __init__(self, model: GPT2, batch: int, capacity: int) -> None:
        shape = model.shape
        heads = (shape.n_head, capacity, shape.n_embd // shape.n_head)
        size = (shape.n_layer, 2, batch, *heads)  # (n_layer, 2, B, H, S, D)
        self.store = torch.empty(size, device=model.wte.weight.device, dtype=model.residual_dtype)
        self.length = 0
        self.padding: Tensor | None = None  # (B,); None if no row has any

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's keys and values of the new positions, (B, H, t, D); returns those of all positions."""
        end = self.length + key.size(2)
        self.store[layer, 0, :, :, self.length : end] = key
        self.store[layer, 1, :, :, self.length : end] = value
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]

    def mask(self, new: int) -> Tensor | None:
        """Return the attention mask of the new positions, (B, 1, t, S); None for the plain causal mask."""
        if self.padding is None:
            return None
        positions = torch.arange(self.length + new, device=self.padding.device)
        queries = positions[None, self.length :, None]
        not_padding = positions[None, None, :] >= self.padding[:, None, None]  # (B, 1, S)
        causal = positions[None, None, :] <= queries  # (1, t, S)
        itself = positions[None, None, :] == queries  # gives the softmax of a padding position one term
        return (not_padding & causal | itself)[:, None]


@dataclass(frozen=True)
class DecoderLayer:
    """A block's layer norms and projections."""

    ln_1: nn.LayerNorm
    c_attn: Projection
    attn_c_proj: Projection
    ln_2: nn.LayerNorm
    c_fc: Projection
    mlp_c_proj: Projection


class Decoder:
    """Computes the logits of each row's next token.

    `weights`: None for the model's weights as they are, or a key of PACKERS. On a CPU, packing moves the weights
    out of the model.

    Raises BadInput: the device does not support these weights.
    """

    def __init__(self, model: GPT2, weights: str | None = None) -> None:
        self.model = model
        device = model.wte.weight.device.type
        self.autocast = torch.autocast(device, torch.float16, enabled=False)
        pack = PACKERS[weights] if weights else _keep
        self.output: Projection = model.logits
        if weights and device != "cpu":  # packing is not verified on a GPU
            pack = _keep
            if weights == "int8":
                raise BadInput("int8 weights on a GPU", "--weights float16, or --device cpu")
            if weights == "float16":
                model.cast_matrices(torch.float16)
                self.autocast = torch.autocast(device, torch.float16)
                self.output = lambda x: F.linear(x, model.wte.weight)[..., : model.shape.vocab_size]
        self.layers = []
        for module in model.h:
            block = cast(Block, module)
            attention = pack(block.attn.c_attn), pack(block.attn.c_proj)
            mlp = pack(block.mlp.c_fc), pack(block.mlp.c_proj)
            self.layers.append(DecoderLayer(block.ln_1, *attention, block.ln_2, *mlp))
        if pack in (_pack_float16, _pack_int8):
            output = nn.Linear(1, 1, bias=False)
            output.weight = nn.Parameter(model.wte.weight.detach()[: model.shape.vocab_size], requires_grad=False)
            self.output = pack(output)
        elif pack is _pack_float32:
            _store_by_columns(model.wte)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Return the logits (B, V) after new ids (B, t), and append these to the cache."""
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
        """Compute attention from c_attn's output (B, t, 3 · C); returns (B, t, C)."""
        B, new, C = projected.size(0), projected.size(1), projected.size(2) // 3
        heads = projected.to(self.model.residual_dtype).view(B, new, 3, self.model.shape.n_head, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, t, D)
        key, value = cache.extend(index, key, value)
        # Several new positions occur only in an empty cache; a single one attends to all.
        y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None and new > 1)
        return y.transpose(1, 2).reshape(B, new, C)


def _keep(layer: nn.Linear) -> Projection:
    return lambda x: linear(x, layer)


def _store_by_columns(layer: nn.Linear | nn.Embedding) -> None:
    """Store a matrix by columns in memory; its values and shape stay the same."""
    layer.weight.data = layer.weight.data.t().contiguous().t()


def _pack_float32(layer: nn.Linear) -> Projection:
    _store_by_columns(layer)
    return lambda x: linear(x, layer)


def _pack_float16(layer: nn.Linear) -> Projection:
    packed = torch.ops.quantized.linear_prepack_fp16(layer.weight.detach().float(), layer.bias)
    layer.weight.data = torch.empty(0)
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def _pack_int8(layer: nn.Linear) -> Projection:
    weight = layer.weight.detach().float()
    scales = weight.abs().amax(1).clamp(min=1e-12) / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these functions are deprecated, but the locked versions have them
        zeros = torch.zeros(len(scales), dtype=torch.long)
        rounded = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(rounded, layer.bias)
    layer.weight.data = torch.empty(0)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


PACKERS = {"float32": _pack_float32, "float16": _pack_float16, "int8": _pack_int8}
