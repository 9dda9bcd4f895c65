"""Muon for the matrices inside the blocks, AdamW for the rest: the same loss from fewer tokens, and less memory.

A matrix's update is its momentum with all singular values set to one (Jordan et al. 2024,
kellerjordan.github.io/posts/muon): all directions move equally, not only those that dominate the gradient. Each row, a
neuron, is then normalized by a running mean of its squares (NorMuon, Li et al. 2025, arXiv:2510.05491). The optimizer
state has one number per weight; AdamW's has two.
"""

from typing import Any

import torch
from torch import Tensor

from gpt2box.distributed.fsdp import full_tensor, local_rows, local_shard, shard_like, zeros_sharded_like
from gpt2box.optim.low_memory_adamw import CHUNK, LowMemoryAdamW, init_state, load_moment, local_state, store_moment
from gpt2box.optim.quantization import round_to_bfloat16

MOMENTUM = 0.95  # Jordan's, as is Nesterov's lookahead
ROW_BETA = 0.95  # decay of the row means; NorMuon's
UPDATE_RMS = 0.2  # × learning rate, as AdamW's updates: one rate for both (Liu et al. 2025, arXiv:2502.16982)
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


class Muon(LowMemoryAdamW):
    """Muon for the parameter groups with a key `stacked`, AdamW for the others.

    `stacked` is the number of matrices that a tensor holds one above the other, as c_attn holds those of queries, keys
    and values. `product_dtype` is the dtype of the matrix products.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        states: str,
        seed: int,
        product_dtype: torch.dtype,
    ):
        super().__init__(groups, lr, betas, states, seed)
        self.product_dtype = product_dtype
        for group in self.param_groups:
            for parameter in group["params"] if "stacked" in group else []:
                self.state[parameter] = init_state(parameter, states, ("exp_avg",))
                self.state[parameter]["row_sq"] = zeros_sharded_like(parameter, parameter.size(0))

    @torch.no_grad()
    def update_parameter(self, parameter: Tensor, group: dict[str, Any], grad: Tensor, good: Tensor) -> None:
        """Update one parameter. Where `good` (0 or 1, a device scalar) is 0, change nothing.

        Singular values are those of the full matrix: if it is sharded, each rank gathers the momentum, computes the
        same update, and applies its own rows of it.
        """
        if "stacked" not in group:
            return super().update_parameter(parameter, group, grad, good)
        assert self.generator is not None, "call begin_step() first"
        stacked, lr = group["stacked"], group["lr"]
        state, skip, rows = local_state(self.state[parameter]), good == 0, local_rows(parameter)
        state["step"] += good
        direction = full_tensor(shard_like(self.update_momentum(state, grad, skip, self.grad_scale), parameter))
        matrices = direction.view(stacked, -1, direction.size(1))  # (stacked, rows, columns)
        update = orthogonalize(matrices, self.product_dtype).float()
        squares, row_sq = update.square().mean(-1).view(-1)[rows], state["row_sq"]
        row_sq.copy_(torch.where(skip, row_sq, row_sq.lerp(squares, 1 - ROW_BETA)))
        update /= full_tensor(self.state[parameter]["row_sq"]).sqrt().view(stacked, -1, 1) + group["eps"]
        norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True).clamp(min=1e-30)
        update *= lr * UPDATE_RMS * update[0].numel() ** 0.5 / norm
        weights = local_shard(parameter)
        before = weights.float()
        after = before * (1 - lr * group["weight_decay"]) - update.view_as(direction)[rows]
        after = torch.where(skip, before, after)
        weights.copy_(round_to_bfloat16(after, self.generator) if weights.dtype == torch.bfloat16 else after)

    def update_momentum(self, state: dict[str, Tensor], grad: Tensor, skip: Tensor, scale: Tensor | None) -> Tensor:
        """Add a gradient to the momentum, chunk by chunk; returns Nesterov's lookahead, float32 in the grad's shape."""
        assert self.generator is not None
        lookahead = torch.empty(grad.numel(), device=grad.device)
        gradients = grad.reshape(-1)
        for begin in range(0, grad.numel(), CHUNK):
            chunk = slice(begin, begin + CHUNK)
            g = gradients[chunk].float()
            g = torch.where(skip, 0.0, g if scale is None else g / scale)
            momentum = load_moment(state, "exp_avg", chunk)
            momentum = torch.where(skip, momentum, momentum.lerp(g, 1 - MOMENTUM))
            store_moment(state, "exp_avg", chunk, momentum, skip, self.generator)
            lookahead[chunk] = g.lerp_(momentum, MOMENTUM)
        return lookahead.view_as(grad)


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the approximately nearest matrices (stacked, rows, columns) with all singular values 1, in `dtype`."""
    tall = matrices.size(1) > matrices.size(2)
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x: Tensor = (matrices / (norm * SAFETY + 1e-7)).to(dtype)
    x = x.mT if tall else x  # so that A is the smaller of the two
    for a, b, c in POLAR_EXPRESS:
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
