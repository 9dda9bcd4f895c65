"""Cross-entropy of a tied output layer without all logits in memory.

The logits of GPT-2 are by far its largest activation: a micro-batch of 4 × 1024 tokens has 824 MB
of them in float32, and autograd keeps several copies. Here the forward pass computes logits, loss and gradient for one
chunk of tokens at a time, so that only a chunk's logits exist and no product is computed twice. (The idea is public,
e.g. in Liger Kernel's fused linear cross-entropy.)
"""

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -1  # a target that is excluded from the loss
VOCAB_CHUNK = 16_384  # rows of the output layer whose gradient is computed at a time


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_tokens: int, scale: float = 1.0
) -> Tensor:
    """Return scale × mean cross-entropy of softmax(hidden · weightᵀ), a float32 (float64 for float64) scalar.

    hidden (M, C); weight (P, C), with padding in the rows from vocab_size on; targets (M,) of ids or -1. Under autocast
    the products run in its dtype, sums in float32. If all targets are -1, the loss is 0.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    arguments = (hidden, weight, targets, vocab_size, chunk_tokens, scale, dtype, torch.is_grad_enabled())
    result: Tensor = _ChunkedCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass; backward only returns them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        chunk_tokens: int,
        scale: float,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> Tensor:
        sums = torch.promote_types(torch.float32, hidden.dtype)
        needs_grad = grad_enabled and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        needs_weight_grad = needs_grad and ctx.needs_input_grad[1]  # False for a frozen weight
        counted = targets != IGNORE_INDEX  # (M,)
        factor = scale / counted.sum().clamp(min=1).to(sums)  # of each token's loss
        weight_low = weight.to(dtype)
        loss = torch.zeros((), device=hidden.device, dtype=sums)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight: Tensor | None = None
        for begin in range(0, hidden.size(0), chunk_tokens):
            rows = slice(begin, begin + chunk_tokens)
            chunk = hidden[rows].to(dtype)  # (m, C)
            target = targets[rows].clamp(min=0).long().unsqueeze(1)  # (m, 1)
            share = torch.where(counted[rows], factor, 0.0).unsqueeze(1)  # (m, 1)
            logits = (chunk @ weight_low.t()).to(sums)  # (m, P), the one large tensor
            logits[:, vocab_size:].fill_(-torch.inf)
            highest = logits.amax(1, keepdim=True)
            at_target = logits.gather(1, target) - highest
            exp = logits.sub_(highest).exp_()
            total = exp.sum(1, keepdim=True)
            loss += ((total.log() - at_target) * share).sum()
            if grad_hidden is None:
                continue
            exp.mul_(share / total).scatter_add_(1, target, -share)  # share × (softmax - one_hot(target))
            grad = exp.to(dtype)
            del logits, exp  # free them before the next chunk allocates its own
            grad_hidden[rows] = grad @ weight_low
            if not needs_weight_grad:
                continue
            if grad_weight is None:
                grad_weight = torch.zeros_like(weight, dtype=sums)
            if dtype == sums:
                grad_weight.addmm_(grad.t(), chunk)
            else:  # in chunks of the vocabulary, because the product needs a matrix of its own
                for begin_row in range(0, weight.size(0), VOCAB_CHUNK):
                    part = slice(begin_row, begin_row + VOCAB_CHUNK)
                    grad_weight[part] += grad[:, part].t() @ chunk
            del grad
        if needs_grad:
            ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        outer = grad_outputs[0]
        # On a CPU, where the test costs no synchronization, skip a pass over the largest gradient.
        if torch.compiler.is_compiling() or outer.device.type != "cpu" or outer != 1:
            grad_hidden.mul_(outer)
            if grad_weight is not None:
                grad_weight.mul_(outer)
        return grad_hidden, grad_weight, None, None, None, None, None, None
