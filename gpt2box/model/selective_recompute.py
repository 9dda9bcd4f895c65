"""Selective activation checkpointing: linear layers that recompute the norm or GELU before them in the backward pass.

`Linear(f(x))` needs f(x) for the gradient of its weights. Here autograd saves only x, which f's own gradient needs
anyway, and f(x), a norm or a GELU, is computed again. Under bfloat16 autocast a block saves 24·C bytes per token, not
36·C; no matrix product is computed twice. It uses the operators of autograd itself, so that torch.compile can trace it;
torch 2.4 has no public API for selective checkpointing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return layer(x) plus the output of its LoRA adapter, if it has one.

    If the weight has another dtype, its cast copy is not saved but made again in the backward pass.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not autocast and layer.weight.dtype == x.dtype:
        out: Tensor = layer(x)
    else:
        out = _CastLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    adapter = getattr(layer, "lora", None)
    return out if adapter is None else out + adapter(x)


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """Return linear(norm(x)), saving x and the norm's mean and deviation."""
    out: Tensor = _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)  # type: ignore[no-untyped-call]
    return out


def gelu_linear(x: Tensor, linear: nn.Linear, approximate: str) -> Tensor:
    """Return linear(gelu(x)), saving x."""
    out: Tensor = _GeluLinear.apply(x, linear.weight, linear.bias, approximate)  # type: ignore[no-untyped-call]
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x · weightᵀ + bias in the dtype of autocast, or of x."""
    return F.linear(x, weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype), bias)


def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight and bias, with products in the dtype of `grad`, which autocast chose."""
    rows = grad.flatten(0, -2)  # (M, out)
    grad_x = grad @ weight.to(grad.dtype)
    grad_weight = (rows.t() @ x.to(grad.dtype).flatten(0, -2)).to(weight.dtype)
    # Biases are float32 also with bfloat16 matrices.
    return grad_x, grad_weight, rows.sum(0).to(torch.promote_types(weight.dtype, torch.float32)) if has_bias else None


class _CastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.frozen = not weight.requires_grad  # its gradient, the only use of x, is not needed
        ctx.save_for_backward(None if ctx.frozen else x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.frozen:
            return grad_outputs[0] @ weight.to(grad_outputs[0].dtype), None, None
        return _linear_backward(grad_outputs[0], x, weight, ctx.has_bias)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, [x.size(-1)], scale, shift, eps)
        ctx.save_for_backward(x, scale, shift, mean, rstd, weight)
        ctx.eps, ctx.has_bias = eps, bias is not None
        return _product(normed, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, mean, rstd, weight = ctx.saved_tensors
        width = [x.size(-1)]
        normed = F.layer_norm(x, width, scale, shift, ctx.eps)
        grad_normed, grad_weight, grad_bias = _linear_backward(grad_outputs[0], normed, weight, ctx.has_bias)
        wanted = [True, True, shift is not None]
        grads = aten.native_layer_norm_backward(grad_normed.to(x.dtype), x, width, mean, rstd, scale, shift, wanted)
        return grads[0], grads[1], grads[2] if shift is not None else None, None, grad_weight, grad_bias


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.approximate = bias is not None, approximate
        return _product(F.gelu(x, approximate=approximate), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        active = F.gelu(x, approximate=ctx.approximate)
        grad_active, grad_weight, grad_bias = _linear_backward(grad_outputs[0], active, weight, ctx.has_bias)
        grad_x = aten.gelu_backward(grad_active.to(x.dtype), x, approximate=ctx.approximate)
        return grad_x, grad_weight, grad_bias, None
