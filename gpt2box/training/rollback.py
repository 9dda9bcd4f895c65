"""Roll back to a checkpoint after bad or unfinished steps, and translate machine failures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpt2box.checkpoint import retention
from gpt2box.checkpoint.loader import restore_checkpoint
from gpt2box.checkpoint.metadata import Rollback, TrainState, load_verified_state, parse_state, write_state
from gpt2box.errors import BadInput, Damaged, Gpt2boxError, MachineCannot, TryAgain, VolumeUnwritable
from gpt2box.model.gpt2 import GPT2
from gpt2box.optim.factory import Optimizer
from gpt2box.optim.loss_spikes import MAX_CONSECUTIVE_BAD_STEPS
from gpt2box.planner.run_plan import RunPlan
from gpt2box.runs.formatting import skip_reason
from gpt2box.system.device import translate_cuda_oom
from gpt2box.system.host import explain_host_oom, is_host_oom
from gpt2box.training.model_setup import init_on_all_ranks
from gpt2box.utils.files import check_lock_token
from gpt2box.utils.paths import checkpoint_step, display_path, list_checkpoints
from gpt2box.utils.progress import log_line
from gpt2box.utils.ranks import rank_info

if TYPE_CHECKING:
    from gpt2box.training.job import Job

MAX_ROLLBACKS = 3  # to the same checkpoint

# CUDA, cuBLAS and NCCL messages of a failed GPU, other than out of memory.
GPU_FAULTS = re.compile(
    r"(cuda|cublas|cudnn|nccl|nvidia).*(unspecified launch failure|illegal memory access|illegal instruction|"
    r"uncorrectable|\becc\b|device.*lost|lost.*device|fallen off the bus|hardware stack error|misaligned address|"
    r"launch timed out|device-side assert|device not ready|no longer (available|accessible)|unknown error|"
    r"no cuda-capable device|busy or unavailable|invalid program counter|not supported on global/shared address space|"
    r"driver shutting down|execution_failed|internal_error|mapping of buffer object failed|contained|xid)",
    re.IGNORECASE | re.DOTALL,
)
CUDA_ADVICE = re.compile(
    r"compile with `TORCH_USE_CUDA_DSA`.*", re.IGNORECASE
)  # at the end of all that CUDA says, in 2.4


class UnfinishedStep(Exception):
    """Memory ran out after only some weights were updated; the last checkpoint must be restored."""


class TooManyBadSteps(Exception):
    """MAX_CONSECUTIVE_BAD_STEPS steps up to `step` were bad; the run must roll back."""

    def __init__(self, step: int, left_out: str, spikes: int) -> None:
        super().__init__(step)
        self.step, self.left_out, self.spikes, self.reason = (
            step,
            left_out,
            spikes,
            skip_reason(MAX_CONSECUTIVE_BAD_STEPS, spikes),
        )


def restore_last_checkpoint(job: Job) -> None:
    """Restore the newest checkpoint."""
    found = retention.find_newest_checkpoint(job.run / "checkpoints")
    assert found, "with optimizer_in_backward, the first evaluation saves"
    job.state = found[1]
    restore_checkpoint(found[0], job.model, job.optimizer, job.state)
    log_line(f"  some weights had taken that step already: going on from {display_path(found[0])}")


def choose_rollback(job: Job, trouble: TooManyBadSteps) -> tuple[Path, TrainState]:
    """Select the newest good checkpoint and record in its state.json which data to skip; delete later checkpoints.

    The same weights and data would fail again; other data often avoid the problem (Chowdhery et al. 2022, 5.1, skipped
    200 to 500 batches).

    Raises:
        BadInput: There is none, or it and the previous one were restored MAX_ROLLBACKS times.
        VolumeUnwritable: Its state cannot be written.
    """
    check_lock_token(job.run / ".lock", job.lock_mark)
    folder, state, past = find_rollback_checkpoint(job, trouble)
    left_out = trouble.step + job.state.data_step - job.state.step - state.data_step
    state.rollbacks.append(Rollback(state.step, left_out, past))
    state.seconds = max(state.seconds, job.state.seconds)  # keep the training time
    for path in reversed(list_checkpoints(folder.parent)):
        if checkpoint_step(path) > state.step:
            retention.delete_checkpoint(path)
    write_state(folder, state, parse_state(folder)[1])
    retention.update_links(folder.parent, state)
    log_line(
        f"step {trouble.step:,}: {trouble.reason}, {MAX_CONSECUTIVE_BAD_STEPS} steps in a row ({trouble.left_out}): "
        f"back to {display_path(folder)}, passing over the data of {left_out:,} steps"
        + (f"; {MAX_ROLLBACKS} returns to that of step {past:,} did not help" if past else "")
    )
    return folder, state


def roll_back(job: Job, trouble: TooManyBadSteps) -> None:
    """Restore a good checkpoint on rank 0 and send it to all ranks."""
    folder, state = job.group.run_on_rank0(lambda: choose_rollback(job, trouble))
    job.state = state

    def read(model: GPT2, optimizer: Optimizer) -> None:
        restore_checkpoint(folder, model, optimizer, state)

    init_on_all_ranks(job.model, job.optimizer, job.plan, job.group, read)


def find_rollback_checkpoint(job: Job, trouble: TooManyBadSteps) -> tuple[Path, TrainState, int]:
    """Return the newest intact rollback candidate, its state, and the step of an abandoned newer one, or 0.

    After MAX_ROLLBACKS rollbacks a checkpoint is abandoned for the previous one, since the cause may predate it. Only
    once: retention keeps two, and a third may exist only because the run was interrupted.
    """
    past = 0
    paths = [path for path in list_checkpoints(job.run / "checkpoints") if checkpoint_step(path) <= trouble.step]
    for path, _ in retention.rollback_candidates(paths, job.plan.derived.save_interval):
        try:
            state = load_verified_state(path)
        except Damaged as fault:
            log_line(f"note: passed over a damaged checkpoint: {fault.found}")
            continue
        returns = [rollback for rollback in state.rollbacks if rollback.step == state.step]
        if len(returns) < MAX_ROLLBACKS:
            return path, state, past
        if past or any(rollback.past for rollback in returns):
            raise rollback_exhausted_error(job, trouble, path)
        past = state.step
    raise rollback_exhausted_error(
        job, trouble, job.run / "checkpoints" / retention.checkpoint_name(past) if past else None
    )


def rollback_exhausted_error(job: Job, trouble: TooManyBadSteps, tried: Path | None) -> BadInput:
    """Return the error for a run that rollbacks did not help."""
    again = f", also after {MAX_ROLLBACKS} returns to {tried} with other data" if tried else ""
    last = job.run / "checkpoints" / "last"
    usual = "a too high learning rate or damaged weights are the usual cause"
    meant = "; if such a rise is right, --spike-sigma 0 --allow-change spike-sigma" if trouble.spikes else ""
    return BadInput(
        f"step {trouble.step}: {trouble.reason}, {MAX_CONSECUTIVE_BAD_STEPS} steps in a row "
        f"({trouble.left_out}){again}",
        f"finite numbers{' near those before' if trouble.spikes else ''}; {usual}",
        f"try --learning-rate {job.plan.config.learning_rate / 2:g} or --dtype float32 under another --name"
        + (f"; the last good checkpoint is {last.resolve()}" if last.exists() else "")
        + meant,
    )


def out_of_memory_error(plan: RunPlan) -> MachineCannot:
    """Return the error for a step that no smaller plan can retry: none is left, or several ranks take part."""
    execution = plan.execution
    if plan.derived.shard:
        less = next(
            (n for n in range(execution.micro_batch_size - 1, 0, -1) if execution.micro_batch_size % n == 0),
            0,
        )
        flags = f"--micro-batch-size {less} " if less else ""
        flags += "" if execution.activation_checkpointing == "full" else "--activation-checkpointing full"
        return MachineCannot(
            f"rank {rank_info().rank}: out of memory with micro_batch_size {execution.micro_batch_size}, "
            f"activation_checkpointing {execution.activation_checkpointing}, in a step of all ranks, "
            "that share the weights",
            "as much free memory on each GPU as at the beginning, and a plan that holds (it is estimated)",
            f"{flags.strip() or 'more GPUs'}: goes on from the last checkpoint with less on each",
        )
    if execution.ranks > 1:
        return MachineCannot(
            f"rank {rank_info().rank}: out of memory with micro_batch_size {execution.micro_batch_size}, "
            "in a step of all ranks",
            "as much free memory on each GPU as at the beginning (other programs' share counts: gpt2box monitor)",
            "the same command goes on from the last checkpoint, in a way that takes less if need be",
        )
    return MachineCannot(
        f"out of memory with micro_batch_size {execution.micro_batch_size}, block_size {plan.shape.block_size}, "
        f"activation_checkpointing {execution.activation_checkpointing}, and no way is left that takes less",
        "memory for one sequence (other programs' share counts: gpt2box monitor)",
        "close other programs; the same command then goes on from the last checkpoint",
    )


def machine_error(error: BaseException, job: Job) -> Gpt2boxError | None:
    """Translate a machine failure into an expected error; return None for any other, which is a bug.

    Nothing is saved from a failed GPU: its memory cannot be trusted.
    """
    text = str(error)
    if isinstance(error, OSError):
        try:
            check_lock_token(job.run / ".lock", job.lock_mark)
        except VolumeUnwritable as fault:
            return fault
        return None  # the command line translates disk errors
    last = job.run / "checkpoints" / "last"
    resumes = f"from {display_path(last.resolve())}" if last.exists() else "from the beginning"
    if is_host_oom(error):
        return MachineCannot(
            f"the machine's own memory ran out in step {job.state.step + 1:,}",
            "free memory (docs/memory.md)",
            f"close other programs; the same command goes on {resumes}",
        )
    if isinstance(error, RuntimeError) and GPU_FAULTS.search(CUDA_ADVICE.sub("", text)):
        first = text.strip().splitlines()[0]
        return TryAgain(
            f"the GPU failed in step {job.state.step + 1:,}: {first}",
            "a GPU that answers; `sudo dmesg | grep -i xid` names the fault",
            f"the same command goes on {resumes}; if it comes again: a reboot, then power, heat, memory of the card",
        )
    return None


@contextmanager
def reporting_oom(plan: RunPlan) -> Iterator[None]:
    """Report an out-of-memory error while the model is built: there is no fallback then."""
    try:
        with translate_cuda_oom(), explain_host_oom("the network is made"):
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise out_of_memory_error(plan) from error
