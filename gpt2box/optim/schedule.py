"""The learning rate schedules."""

import math

from gpt2box.planner.run_plan import RunPlan


def learning_rate_at(step: int, plan: RunPlan) -> float:
    """Return the learning rate of a step, counted from 0: linear warmup, then the decay to min_lr."""
    config, derived = plan.config, plan.derived
    high, low = config.learning_rate, derived.min_lr
    if step < derived.warmup_steps:
        return high * (step + 1) / derived.warmup_steps
    if config.lr_schedule == "constant":
        return high
    begin = derived.warmup_steps
    if config.lr_schedule == "constant-linear":
        begin = max(begin, derived.decay_steps - round(derived.decay_steps * config.decay_fraction))
    progress = min(max((step - begin) / max(derived.decay_steps - begin, 1), 0.0), 1.0)
    share = (1 + math.cos(math.pi * progress)) / 2 if config.lr_schedule == "cosine" else 1 - progress
    return low + share * (high - low)
