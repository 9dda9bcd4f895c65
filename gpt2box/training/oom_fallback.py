"""Where memory runs out in the middle of a run: the same steps in a way that takes less, and back again."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.search import next_smaller_plan
from gpt2box.runs.sessions import record_execution
from gpt2box.system.device import translate_cuda_oom
from gpt2box.system.host import memory_bytes
from gpt2box.training.console import Display
from gpt2box.training.evaluate import autocast

if TYPE_CHECKING:
    from gpt2box.training.trainer import Job

RETRY_STEPS = 100  # after memory ran out, until the way before is tried again; twice as many each time it ran out


def step_down(job: Job, display: Display) -> None:
    """Give memory back and take the fastest way that needs less.

    Raises:
        torch.cuda.OutOfMemoryError: there is none, or other ranks are already waiting for this one's gradients.
    """
    if not job.group.is_single_process:
        raise torch.cuda.OutOfMemoryError(f"at step {job.state.step}")
    way = next_way(job)
    job.left.append(job.plan.execution)
    job.retry_steps = max(2 * job.retry_steps, RETRY_STEPS)
    job.retry_at = job.state.step + job.retry_steps
    take_way(job, way)
    display.print_line(
        f"out of memory in step {job.state.step + 1:,}: doing it again with {way.describe()}; "
        f"a step stays {job.plan.config.tokens_per_step:,} tokens"
    )


def next_way(job: Job) -> ExecutionPlan:
    """The fastest way that needs less, with the memory of the one before given back.

    Raises:
        torch.cuda.OutOfMemoryError: there is none.
    """
    job.optimizer.zero_grad(set_to_none=job.group.is_single_process)
    gc.collect()
    torch.cuda.empty_cache()
    way = next_smaller_plan(job.ways, job.plan.execution.memory.components())
    if way is None:
        raise torch.cuda.OutOfMemoryError(f"at step {job.state.step}")
    return way


def rehearse(job: Job, forward: Any, display: Display) -> None:
    """Of several ranks, before the first step: find a way that has memory enough on all.

    In a step there is no way back: where one rank breaks off, the others wait for its gradients. So each does a
    micro-step by itself, on nothing but zeros, and says how it went. Where memory runs out later, since another program
    took it, the run ends. Weights that are split over the ranks leave none a micro-step by itself: no rehearsal then.

    Raises:
        torch.cuda.OutOfMemoryError: even the least was too much for one of them.
    """
    while not job.group.is_single_process and not job.plan.derived.shard:
        plan, done = job.plan, False
        nothing = torch.zeros(
            plan.execution.micro_batch_size, plan.shape.block_size, dtype=torch.int32, device=plan.derived.device
        )
        loss = None
        with (
            suppress(torch.cuda.OutOfMemoryError),
            translate_cuda_oom(),
            job.group.gradient_sync(forward, is_last=False),
        ):
            with autocast(plan):
                loss = forward(nothing, nothing, 1.0)
            loss.backward()
            done = True
        del loss  # with the tensors of a pass that broke off
        if all(job.group.all_gather(done)):
            job.optimizer.zero_grad(set_to_none=False)
            return
        take_way(job, next_way(job))
        display.print_line(f"out of memory: going on with {job.plan.execution.describe()} on all ranks")


def step_up(job: Job, display: Display) -> None:
    """Return to the way before memory ran out, where there seems to be memory for it again."""
    way = job.left[-1]
    further = way.total_bytes - job.plan.execution.total_bytes
    device = torch.device(job.plan.derived.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_bytes()[1]
    job.retry_at = job.state.step + RETRY_STEPS
    if free < further:
        return
    job.left.pop()
    take_way(job, way)
    display.print_line(f"memory is free again: from step {job.state.step + 1:,} with {way.describe()}")


def take_way(job: Job, way: ExecutionPlan) -> None:
    """The same steps, done otherwise from now on."""
    job.plan = replace(job.plan, execution=way)
    job.model.activation_checkpointing = way.activation_checkpointing


def note_way(job: Job, display: Display) -> None:
    """Have manifest.json say in which way the steps are done from here on, so that they can be done again (verify.py).

    A disk that refuses it is not worth the run: it is said, and the next save finds out whether the disk works.
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
