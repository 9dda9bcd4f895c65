"""AdamW, the clipped step, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gpt2box.distributed.fsdp import local, norm_over_ranks
from gpt2box.model.gpt2 import GPT2
from gpt2box.optim.loss_spikes import BadSteps
from gpt2box.optim.low_memory_adamw import LeanAdamW, StepInBackward
from gpt2box.optim.muon import Muon
from gpt2box.planner.run_plan import RunPlan

Optimizer = torch.optim.AdamW | LeanAdamW


def make_optimizer(model: GPT2, plan: RunPlan) -> Optimizer:
    """AdamW of all parameters, or of the adapters alone; PyTorch's fused one where the plan is plain.

    Weight decay is on matrices only, not on biases and norms. The averages are made here and not in the first step,
    which might find no memory for them half-way.
    """
    betas = (plan.beta1, plan.beta2)
    if plan.optimizer == "muon":
        products = torch.bfloat16 if plan.dtype == "bfloat16" else torch.float32
        return Muon(muon_groups(model, plan), plan.learning_rate, betas, plan.optimizer_states, plan.seed, products)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    plain = plan.optimizer_states == "float32" and matrices[0].dtype == torch.float32
    if plan.optimizer_in_backward or plan.shard or not plain:
        return LeanAdamW(groups, plan.learning_rate, betas, plan.optimizer_states, plan.seed)
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=betas, fused=True)
    for parameter in [*matrices, *vectors]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def muon_groups(model: GPT2, plan: RunPlan) -> list[dict[str, Any]]:
    """Matrices inside the blocks, of which c_attn is three, go to Muon; embeddings and vectors to AdamW."""
    named = dict(model.named_parameters())
    inside = {name for name, p in named.items() if name.startswith("h.") and p.dim() >= 2}
    attention = {name for name in inside if name.endswith("c_attn.weight")}
    embeddings = {name for name, p in named.items() if p.dim() >= 2} - inside

    def of(names: set[str]) -> list[Tensor]:
        return [p for name, p in named.items() if name in names]

    return [
        {"params": of(attention), "weight_decay": plan.weight_decay, "parts": 3},
        {"params": of(inside - attention), "weight_decay": plan.weight_decay, "parts": 1},
        {"params": of(embeddings), "weight_decay": plan.weight_decay},
        {"params": of(named.keys() - inside - embeddings), "weight_decay": 0.0},
    ]


def make_update(optimizer: Optimizer, plan: RunPlan, bad_steps: BadSteps | None = None) -> GuardedStep | StepInBackward:
    """What turns gradients into a step; `bad_steps`: what to count on from."""
    device = torch.device(plan.device)
    update: GuardedStep | StepInBackward
    if plan.optimizer_in_backward:
        assert isinstance(optimizer, LeanAdamW)
        update = StepInBackward(optimizer, plan.grad_clip, plan.grad_accum_steps, device)
    else:
        keep = plan.ranks > 1 and not plan.shard
        update = GuardedStep(optimizer, plan.grad_clip, device, keep_gradients=keep, split=plan.shard)
    update.bad_steps = bad_steps or BadSteps.of(plan)
    return update


def learning_rate(step: int, plan: RunPlan) -> float:
    """Of the given step, counted from 0: linear rise, then the schedule down to min_lr."""
    high, low = plan.learning_rate, plan.min_lr
    if step < plan.warmup_steps:
        return high * (step + 1) / plan.warmup_steps
    if plan.lr_schedule == "constant":
        return high
    begin = plan.warmup_steps
    if plan.lr_schedule == "constant-linear":
        begin = max(begin, plan.decay_steps - round(plan.decay_steps * plan.decay_fraction))
    progress = min(max((step - begin) / max(plan.decay_steps - begin, 1), 0.0), 1.0)
    share = (1 + math.cos(math.pi * progress)) / 2 if plan.lr_schedule == "cosine" else 1 - progress
    return low + share * (high - low)


class GuardedStep:
    """An optimizer step that clips, and that neither a non-finite gradient nor a spike of the loss gets through.

    Both happen inside the fused kernel, through the two tensors by which PyTorch's own GradScaler
    speaks to it (`grad_scale`, `found_inf`): no pass over the gradients to scale them, and no waiting
    for the device. How many steps in a row were left out is read when the loop looks anyway.
    """

    left_out = "none reached the weights"

    def __init__(
        self,
        optimizer: Optimizer,
        grad_clip: float,
        device: torch.device,
        keep_gradients: bool = False,
        split: bool = False,
    ) -> None:
        """`keep_gradients`: as zeros, where they belong to what is sent between ranks. `split`: each has some rows."""
        self.optimizer, self.grad_clip = optimizer, grad_clip
        self.keep_gradients, self.split = keep_gradients, split
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.bad_steps = BadSteps(device)

    def before_backward(self, step: int, micro_step: int, lr: float, micro_loss: Tensor) -> None:
        """Called before each backward pass."""
        if isinstance(self.optimizer, LeanAdamW):
            self.optimizer.begin(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def __call__(self, loss: Tensor) -> Tensor:
        """Step with the gradients present, then free them; returns their global norm (a device scalar)."""
        grads = [local(p.grad) for p in self.parameters if p.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32)))
        if self.split:
            norm = norm_over_ranks(norm)
        finite, limit = norm.isfinite() & loss.isfinite(), self.bad_steps.limit()
        bad = (~finite | (loss > limit)).float()
        self.optimizer.grad_scale = (  # type: ignore[union-attr]  # gradients are divided by it
            (norm / self.grad_clip).clamp(min=1.0) if self.grad_clip else torch.ones_like(norm)
        )
        self.optimizer.found_inf = bad  # type: ignore[union-attr]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        self.bad_steps.count(loss, limit, bad, finite)
        return norm

    def close(self) -> None:
        """Nothing is held."""
