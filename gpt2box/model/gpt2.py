"""GPT-2 as published: learned positions, pre-norm blocks, tanh GELU, tied embeddings.

No I/O and no settings: what the shape does not define is an argument. Parameter names are those of Hugging Face's
GPT-2, so that hf_weights.py has little to convert.

    B  sequences     T  tokens of a sequence     C  n_embd     H  heads     D  C / H
    M  B · T         V  vocab_size               P  V padded to a multiple of 64
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2box.model.loss import chunked_cross_entropy
from gpt2box.model.selective_recompute import gelu_linear, linear, norm_linear
from gpt2box.model.shape import ModelShape


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=shape.bias)
        self.n_head, self.dropout = shape.n_head, dropout

    def forward(self, projected: Tensor) -> Tensor:
        """Compute attention and output projection from c_attn's output (B, T, 3 · C); returns (B, T, C)."""
        B, T, C = projected.size(0), projected.size(1), projected.size(2) // 3
        heads = projected.view(B, T, 3, self.n_head, C // self.n_head)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(linear(y, self.c_proj), self.dropout, self.training)


class MLP(nn.Module):
    """Feed-forward network with a hidden width of 4 · C."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)
        self.dropout, self.gelu = dropout, shape.gelu

    def forward(self, hidden: Tensor, selective: bool) -> Tensor:
        """Compute GELU and output projection from c_fc's output (B, T, 4 · C); returns (B, T, C)."""
        if selective:
            x = gelu_linear(hidden, self.c_proj, self.gelu)
        else:
            x = linear(F.gelu(hidden, approximate=self.gelu), self.c_proj)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and inside a residual connection."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.attn = Attention(shape, dropout)
        self.ln_2 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.mlp = MLP(shape, dropout)

    def forward(self, x: Tensor, selective: bool = False) -> Tensor:
        """Map the residual stream (B, T, C) to the next. `selective`: recompute norms and GELU in the backward pass."""
        project = norm_linear if selective else _norm_then_linear
        x = x + self.attn(project(x, self.ln_1, self.attn.c_attn))
        out: Tensor = x + self.mlp(project(x, self.ln_2, self.mlp.c_fc), selective)
        return out


def _norm_then_linear(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor:
    return linear(norm(x), layer)


class GPT2(nn.Module):
    """GPT-2. Rows of `wte` beyond vocab_size are padding: zero, excluded from loss and sampling."""

    def __init__(self, shape: ModelShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.activation_checkpointing = "none"
        self.loss_chunk_tokens = 1024
        self.wte = nn.Embedding(shape.padded_vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.block_size, shape.n_embd)
        self.h = nn.ModuleList(Block(shape, dropout) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd, bias=shape.bias)

    @classmethod
    def empty(
        cls, shape: ModelShape, dropout: float, device: torch.device | str, matrices: torch.dtype = torch.float32
    ) -> GPT2:
        """Allocate the network without values, for weights that are loaded or drawn next. Vectors stay float32."""
        return cls.on_meta_device(shape, dropout, matrices).to_empty(device=device)

    @classmethod
    def on_meta_device(cls, shape: ModelShape, dropout: float, matrices: torch.dtype = torch.float32) -> GPT2:
        """Make the network on the meta device, without memory."""
        with torch.device("meta"):
            model = cls(shape, dropout)
            model.cast_matrices(matrices)
        return model

    def cast_matrices(self, dtype: torch.dtype) -> None:
        """Convert matrices to `dtype`; biases and norms keep theirs."""
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw weights from Normal(0, 0.02), divide residual projections by √(2·n_layer) (Radford et al. 2019, 2.3)."""
        generator = torch.Generator().manual_seed(seed)
        scaled = 0.02 / math.sqrt(2 * self.shape.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name or name.startswith("ln_f"):
                parameter.fill_(1.0)
            else:  # drawn on the CPU, so that a seed gives the same weights on any device
                deviation = scaled if name.endswith("c_proj.weight") else 0.02
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))
        self.wte.weight[self.shape.vocab_size :].zero_()

    def hidden_states(self, ids: Tensor) -> Tensor:
        """Return the final hidden states (B, T, C) of token ids (B, T)."""
        positions = torch.arange(ids.size(1), device=ids.device)
        embedded = self.wte(ids).to(self.residual_dtype) + self.wpe(positions).to(self.residual_dtype)
        x = F.dropout(embedded, self.dropout, self.training)  # (B, T, C)
        for block in self.h:
            if self.training and self.activation_checkpointing == "full":
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, selective=self.training and self.activation_checkpointing == "selective")
        out: Tensor = self.ln_f(x)
        return out

    def forward(self, ids: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        """Return the mean cross-entropy of targets (B, T), ignoring those of -1, times `scale`; float32 scalar."""
        return self.loss(self.hidden_states(ids), targets, scale)

    def loss(self, hidden: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        """Compute the mean cross-entropy of hidden states (B, T, C) against targets (B, T), times `scale`."""
        rows, vocab_size = hidden.flatten(0, 1), self.shape.vocab_size  # (M, C)
        return chunked_cross_entropy(
            rows, self.wte.weight, targets.flatten(), vocab_size, self.loss_chunk_tokens, scale
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (…, V) of hidden states (…, C)."""
        return F.linear(hidden, self.wte.weight.to(hidden.dtype))[..., : self.shape.vocab_size]

    @property
    def residual_dtype(self) -> torch.dtype:
        """Dtype of the residual stream, keys and values: float32 also with bfloat16 matrices."""
        return self.ln_f.weight.dtype
