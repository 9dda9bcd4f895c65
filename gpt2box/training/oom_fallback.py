"""Out-of-memory errors: repeat the step with the next smaller execution plan, and return to the larger one later."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import replace

import torch

from gpt2box.optim.low_memory_adamw import LowMemoryAdamW
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.search import next_smaller_plan
from gpt2box.runs.sessions import record_execution
from gpt2box.system.device import translate_cuda_oom
from gpt2box.system.host import memory_bytes
from gpt2box.training.checkpoint_schedule import CheckpointSchedule
from gpt2box.training.console import Display
from gpt2box.training.evaluate import autocast
from gpt2box.training.job import Job
from gpt2box.training.rollback import UnfinishedStep
from gpt2box.training.step import StepExecutor, StepResult

RETRY_STEPS = 100  # steps until the larger plan is tried again; doubled after each out-of-memory error


def take_step(job: Job, steps: StepExecutor, checkpoints: CheckpointSchedule, display: Display) -> StepResult:
    """Take a step. After an out-of-memory error, repeat it with the next smaller plan; its tokens stay the same.

    Raises:
        UnfinishedStep: some weights had taken the step already; the plan is the smaller one.
        torch.cuda.OutOfMemoryError: no smaller plan is left, or other ranks already wait for this one's gradients.
    """
    while True:
        result = None
        with suppress(torch.cuda.OutOfMemoryError):  # until it is handled, it keeps the step's tensors alive
            result = steps.take()
        if result is not None:
            break
        is_unfinished = getattr(job.optimizer, "is_step_unfinished", False)
        if not is_unfinished:
            checkpoints.save_before_fallback()
        switch_to_smaller_plan(job, display)
        if is_unfinished:
            raise UnfinishedStep
        use_new_plan(job, steps, display)
    if job.larger_plans and job.state.step >= job.retry_at:
        if isinstance(job.optimizer, LowMemoryAdamW) and checkpoints.is_unsaved:
            checkpoints.save()  # a step of the larger plan may stop half-way: the run then returns to here
        if switch_to_larger_plan(job, display):
            use_new_plan(job, steps, display)
    return result


def use_new_plan(job: Job, steps: StepExecutor, display: Display) -> None:
    """Record the job's plan and take the next steps with it."""
    record_plan(job, display)
    steps.use_plan(job.plan)


def switch_to_smaller_plan(job: Job, display: Display) -> None:
    """Free memory and choose the fastest plan that needs less.

    Raises:
        torch.cuda.OutOfMemoryError: none is left, or there are several ranks.
    """
    if not job.group.is_single_process:
        raise torch.cuda.OutOfMemoryError(f"at step {job.state.step}")
    smaller = find_smaller_plan(job)
    job.larger_plans.append(job.plan.execution)
    job.retry_steps = max(2 * job.retry_steps, RETRY_STEPS)
    job.retry_at = job.state.step + job.retry_steps
    set_execution_plan(job, smaller)
    display.print_line(
        f"out of memory in step {job.state.step + 1:,}: doing it again with {smaller.describe()}; "
        f"a step stays {job.plan.config.tokens_per_step:,} tokens"
    )


def find_smaller_plan(job: Job) -> ExecutionPlan:
    """Free the memory of the failed step and return the fastest plan that needs less.

    Raises:
        torch.cuda.OutOfMemoryError: none is left.
    """
    job.optimizer.zero_grad(set_to_none=job.group.is_single_process)
    gc.collect()
    torch.cuda.empty_cache()
    smaller = next_smaller_plan(job.fallback_plans, job.plan.execution.memory.components())
    if smaller is None:
        raise torch.cuda.OutOfMemoryError(f"at step {job.state.step}")
    return smaller


def switch_to_larger_plan(job: Job, display: Display) -> bool:
    """Return to the plan before the last out-of-memory error if enough memory is free; return whether it did."""
    larger = job.larger_plans[-1]
    needed_bytes = larger.total_bytes - job.plan.execution.total_bytes
    device = torch.device(job.plan.derived.device)
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_bytes()[1]
    job.retry_at = job.state.step + RETRY_STEPS
    if free_bytes < needed_bytes:
        return False
    job.larger_plans.pop()
    set_execution_plan(job, larger)
    display.print_line(f"memory is free again: from step {job.state.step + 1:,} with {larger.describe()}")
    return True


def agree_on_plan(job: Job, steps: StepExecutor, display: Display) -> None:
    """Find a plan that fits on all ranks, before the first step of several.

    Inside a step no rank can fall back, since the others wait for its gradients. So each tries one micro-step on zeros
    by itself and reports the outcome. With `shard` no rank can take a micro-step by itself, so nothing is tried.

    Raises:
        torch.cuda.OutOfMemoryError: even the smallest plan does not fit on one of the ranks.
    """
    while not job.group.is_single_process and not job.plan.derived.shard:
        plan, forward, fits = job.plan, steps.forward, False
        shape = (plan.execution.micro_batch_size, plan.shape.block_size)
        zeros = torch.zeros(shape, dtype=torch.int32, device=plan.derived.device)
        loss = None
        with (
            suppress(torch.cuda.OutOfMemoryError),
            translate_cuda_oom(),
            job.group.gradient_sync(forward, is_last=False),
        ):
            with autocast(plan):
                loss = forward(zeros, zeros, 1.0)
            loss.backward()
            fits = True
        del loss  # and with it the tensors of a pass that was broken off
        if all(job.group.all_gather(fits)):
            job.optimizer.zero_grad(set_to_none=False)
            return
        set_execution_plan(job, find_smaller_plan(job))
        steps.use_plan(job.plan)
        display.print_line(f"out of memory: going on with {job.plan.execution.describe()} on all ranks")


def set_execution_plan(job: Job, execution: ExecutionPlan) -> None:
    """Replace the execution plan of the job. The step executor configures the model for it."""
    job.plan = replace(job.plan, execution=execution)


def record_plan(job: Job, display: Display) -> None:
    """Write the execution plan of the next steps into manifest.json, so that verify repeats them in the same way.

    A disk that refuses it does not end the run: the line says so, and the next save finds out whether the disk works.
    """
    if not job.group.is_rank_0:
        return
    try:
        record_execution(job.run, job.plan, job.state.step)
    except OSError as error:
        display.print_line(
            f"note: manifest.json does not say that steps are done with {job.plan.execution.describe()} after step "
            f"{job.state.step:,}, so `gpt2box verify` cannot do them in the same bits: {error.strerror}"
        )
