"""The learning rate schedules."""

from __future__ import annotations

import math

from gpt2box.planner.run_plan import RunPlan


def learning_rate_at(step: int, plan: RunPlan) -> float:
    """Return the learning rate of a step, counted from 0: linear warmup, then the decay to min_lr."""
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
