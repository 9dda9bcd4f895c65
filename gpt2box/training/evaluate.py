"""Compute the validation loss, and select the autocast precision of training and evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager, closing, suppress

import torch

from gpt2box.data.dataloader import (
    copy_to_device,
    count_loss_targets,
    inputs_and_targets,
    pin_if_possible,
    read_windows,
    val_window_starts,
)
from gpt2box.data.dataset import Dataset, TokenFile
from gpt2box.distributed.fsdp import is_sharded, reshard
from gpt2box.distributed.group import RankGroup
from gpt2box.model.gpt2 import GPT2
from gpt2box.planner.run_plan import RunPlan
from gpt2box.system.device import translate_cuda_oom


def autocast(plan: RunPlan) -> AbstractContextManager[object]:
    """Return the plan's autocast context; weights stay float32."""
    wanted = plan.derived.dtype == "bfloat16"
    return torch.autocast(torch.device(plan.derived.device).type, torch.bfloat16, enabled=wanted, cache_enabled=False)


@torch.no_grad()
def evaluate(model: GPT2, dataset: Dataset, plan: RunPlan, group: RankGroup) -> tuple[float, str]:
    """Return the mean loss over the fixed validation windows, and their identifier. Ranks share the windows."""
    windows = val_window_starts(dataset.tokens("val"), plan.shape.block_size, plan.config.eval_windows)
    starts = windows[group.ranks.rank :: group.ranks.world_size]
    # With sharded weights every rank must run equally often; a rank that has fewer windows repeats one with weight 0.
    share = -(-len(windows) // group.ranks.world_size) if is_sharded(model) else len(starts)
    total, weights = torch.zeros((), device=plan.derived.device), 0.0
    was_training = model.training
    model.eval()
    begin, count, device = 0, plan.eval_batch_size, torch.device(plan.derived.device)
    with closing(TokenFile(dataset.folder / "val.bin")) as file, autocast(plan):
        while begin < share:
            chosen = [int(start) for start in starts[begin : begin + count]]
            batch = read_windows(file, chosen or [int(windows[0])], plan.shape.block_size, plan.shape.vocab_size)
            # Nothing here waits for the GPU, so it computes the previous windows while these are read.
            inputs, targets = inputs_and_targets(
                copy_to_device(pin_if_possible(batch) if device.type == "cuda" else batch, device)
            )
            loss = None
            halves = [torch.cuda.OutOfMemoryError] if count > 1 and not is_sharded(model) else []
            with suppress(*halves), translate_cuda_oom():
                loss = model(inputs, targets)
            if loss is None:
                torch.cuda.empty_cache()
                count = max(count // 2, 1)
                continue
            weight = count_loss_targets(batch) / plan.shape.block_size if chosen else 0.0
            total, weights = total + loss * weight, weights + weight
            begin += count
    model.train(was_training)
    reshard(model)
    loss, weights = group.all_reduce_sum(float(total), weights)
    return loss / max(weights, 1e-9), f"{dataset.digest}/{len(windows)}x{plan.shape.block_size}"
