"""Muon for the matrices inside the blocks, AdamW for the rest: the same loss from fewer tokens, and less memory.

A matrix's update is its momentum with all singular values made one (Jordan et al. 2024,
kellerjordan.github.io/posts/muon): every direction moves as much, not the few that the gradient favours. Then each row,
a neuron, is brought to an even size by an average of its squares (NorMuon, Li et al. 2025, arXiv:2510.05491). One
number is kept for a weight, not two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt2box.distributed.fsdp import local, rows_of, split_as, whole, zeros
from gpt2box.optim.low_memory_adamw import CHUNK, LeanAdamW, empty_state, load, local_state, store
from gpt2box.optim.quantization import round_to_bfloat16

MOMENTUM = 0.95  # Jordan's, as is Nesterov's look ahead
ROW_BETA = 0.95  # of the rows' average of squares; NorMuon's
UPDATE_RMS = (
    0.2  # at learning rate 1, as AdamW's updates have it: one rate for both (Liu et al. 2025, arXiv:2502.16982)
)
# Coefficients of five steps of x ← a·x + (b·A + c·A²)·x with A = x·xᵀ, for singular values from 0.001 up: Polar Express
# (Amsel et al. 2025, arXiv:2505.16932), with its safety factor for bfloat16.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02


class Muon(LeanAdamW):
    """Groups with `parts` are of matrices: each is that many, one above the other, as queries, keys and values are.

    `products` is the dtype of the matrix products. The others are AdamW's: PyTorch's fused one where weights and
    averages are in float32, LeanAdamW's where they are not.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        states: str,
        seed: int,
        products: torch.dtype,
    ):
        super().__init__(groups, lr, betas, states, seed)
        self.products = products
        for group in self.param_groups:
            for parameter in group["params"] if "parts" in group else []:
                self.state[parameter] = empty_state(parameter, states, ("exp_avg",))
                self.state[parameter]["row_sq"] = zeros(parameter.size(0), parameter)

    @torch.no_grad()
    def take(self, parameter: Tensor, group: dict[str, Any], grad: Tensor, good: Tensor) -> None:
        """Of a matrix in one piece. Where `good` (0 or 1, a device scalar) is 0, nothing changes.

        Singular values are the whole matrix's: where it is split over ranks, each puts the momentum together, works out
        the same update, and takes its rows of it.
        """
        if "parts" not in group:
            return super().take(parameter, group, grad, good)
        assert self.generator is not None, "begin() comes first"
        state, keep, rows = local_state(self.state[parameter]), good == 0, rows_of(parameter)
        state["step"] += good
        aim = whole(split_as(self.take_in(state, grad, keep, self.grad_scale), parameter))
        update = orthogonal(aim.view(group["parts"], -1, aim.size(1)), self.products).float()  # (parts, rows, columns)
        squares, seen = update.square().mean(-1).view(-1)[rows], state["row_sq"]
        seen.copy_(torch.where(keep, seen, seen.lerp(squares, 1 - ROW_BETA)))
        update /= whole(self.state[parameter]["row_sq"]).sqrt().view(group["parts"], -1, 1) + group["eps"]
        size = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True).clamp(min=1e-30)
        update *= group["lr"] * UPDATE_RMS * update[0].numel() ** 0.5 / size
        weights = local(parameter)
        before = weights.float()
        after = before * (1 - group["lr"] * group["weight_decay"]) - update.view_as(aim)[rows]
        after = torch.where(keep, before, after)
        weights.copy_(round_to_bfloat16(after, self.generator) if weights.dtype == torch.bfloat16 else after)

    def take_in(self, state: dict[str, Tensor], grad: Tensor, keep: Tensor, scale: Tensor | None) -> Tensor:
        """Take a gradient into the momentum, in chunks; returns where the momentum is heading (Nesterov), float32."""
        assert self.generator is not None
        aim = torch.empty(grad.numel(), device=grad.device)
        gradients = grad.reshape(-1)
        for begin in range(0, grad.numel(), CHUNK):
            rows = slice(begin, begin + CHUNK)
            g = gradients[rows].float()
            g = torch.where(keep, 0.0, g if scale is None else g / scale)
            momentum = load(state, "exp_avg", rows)
            momentum = torch.where(keep, momentum, momentum.lerp(g, 1 - MOMENTUM))
            store(state, "exp_avg", rows, momentum, keep, self.generator)
            aim[rows] = g.lerp_(momentum, MOMENTUM)
        return aim.view_as(grad)


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest matrices, roughly, whose singular values are all 1; (parts, rows, columns), computed in `dtype`."""
    tall = matrices.size(1) > matrices.size(2)
    size = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x: Tensor = (matrices / (size * SAFETY + 1e-7)).to(dtype)
    x = x.mT if tall else x  # so that A is the smaller of the two
    for a, b, c in POLAR_EXPRESS:
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
