"""The optimizer that the settings ask for: PyTorch's AdamW, LowMemoryAdamW or Muon."""

from typing import Any

import torch
from torch import Tensor

from gpt2box.model.gpt2 import GPT2
from gpt2box.optim.low_memory_adamw import LowMemoryAdamW
from gpt2box.optim.muon import Muon
from gpt2box.planner.run_plan import RunPlan

Optimizer = torch.optim.AdamW | LowMemoryAdamW


def make_optimizer(model: GPT2, plan: RunPlan) -> Optimizer:
    """Create the optimizer of all trainable parameters.

    It is PyTorch's fused AdamW if state and weights are float32 and nothing is sharded. Weight decay applies to
    matrices, not to biases and norms. The optimizer state is allocated here, because running out of memory for it in
    the middle of the first step could not be undone.
    """
    config = plan.config
    betas = (config.beta1, config.beta2)
    if config.optimizer == "muon":
        product_dtype = torch.bfloat16 if plan.derived.dtype == "bfloat16" else torch.float32
        return Muon(
            muon_groups(model, plan), config.learning_rate, betas, config.optimizer_states, config.seed, product_dtype
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    all_float32 = config.optimizer_states == "float32" and matrices[0].dtype == torch.float32
    if config.optimizer_in_backward or plan.derived.shard or not all_float32:
        return LowMemoryAdamW(groups, config.learning_rate, betas, config.optimizer_states, config.seed)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    for parameter in [*matrices, *vectors]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def muon_groups(model: GPT2, plan: RunPlan) -> list[dict[str, Any]]:
    """Assign the matrices inside the blocks to Muon, embeddings and vectors to AdamW. c_attn stacks three matrices."""
    named = dict(model.named_parameters())
    in_blocks = {name for name, p in named.items() if name.startswith("h.") and p.dim() >= 2}
    attention = {name for name in in_blocks if name.endswith("c_attn.weight")}
    embeddings = {name for name, p in named.items() if p.dim() >= 2} - in_blocks

    def select(names: set[str]) -> list[Tensor]:
        return [p for name, p in named.items() if name in names]

    return [
        {"params": select(attention), "weight_decay": plan.config.weight_decay, "stacked": 3},
        {"params": select(in_blocks - attention), "weight_decay": plan.config.weight_decay, "stacked": 1},
        {"params": select(embeddings), "weight_decay": plan.config.weight_decay},
        {"params": select(named.keys() - in_blocks - embeddings), "weight_decay": 0.0},
    ]
