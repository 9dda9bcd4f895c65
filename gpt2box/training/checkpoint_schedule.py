"""When a run saves a checkpoint, and the step and time of its last save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from gpt2box.checkpoint.async_writer import AsyncCheckpointWriter
from gpt2box.checkpoint.writer import save_checkpoint
from gpt2box.errors import Gpt2boxError
from gpt2box.optim.low_memory_adamw import LowMemoryAdamW
from gpt2box.training.rollback import TooManyBadSteps
from gpt2box.training.step import StepExecutor

if TYPE_CHECKING:
    from gpt2box.training.job import Job


class CheckpointSchedule:
    """Knows when a save is due, performs it, and remembers it."""

    def __init__(self, job: Job, writer: AsyncCheckpointWriter, steps: StepExecutor) -> None:
        self.job, self.writer, self.steps = job, writer, steps
        # LowMemoryAdamW's step may stop half-way: the run then needs a checkpoint to return to, also of step 0.
        needs_first = isinstance(job.optimizer, LowMemoryAdamW) and job.group.is_single_process and not job.state.step
        self.saved_step = -1 if needs_first else job.state.step
        self.saved_at = time.monotonic()

    @property
    def is_unsaved(self) -> bool:
        """Return whether steps were taken since the last save."""
        return self.job.state.step != self.saved_step

    def is_overdue(self) -> bool:
        """Return whether save_minutes have passed since the last save."""
        return 0 < self.job.plan.config.save_minutes * 60 <= time.monotonic() - self.saved_at

    def is_due(self, improved: bool, now: bool) -> bool:
        """Return whether to save. `now`: the run ends, or a rank's clock asks for it."""
        state, plan = self.job.state, self.job.plan
        if self.is_unsaved and (now or state.step % plan.derived.save_interval == 0):
            return True
        return improved and (state.step > 0 or self.job.started_from_weights)

    def save(self) -> None:
        """Save in the background.

        Raises:
            TooManyBadSteps: the weights are not worth a checkpoint.
        """
        self.steps.check_bad_steps()
        self.writer.save(self.job.state)
        self.saved_step, self.saved_at = self.job.state.step, time.monotonic()

    def save_before_fallback(self) -> None:
        """Save after an out-of-memory error, unless a checkpoint of this step exists."""
        if not self.is_unsaved:
            return
        # The other ranks would not hear of too many bad steps.
        with suppress(*([] if self.job.group.is_single_process else [TooManyBadSteps])):
            self.steps.check_bad_steps()
        self.save_from_any_rank()

    def save_from_any_rank(self) -> None:
        """Save after an out-of-memory error, on another rank than 0 too if it sees the run's folder.

        All ranks have the same weights, and rank 0 waits for this one inside a step. With `shard` no rank has all
        weights, so nothing can be saved.
        """
        job = self.job
        if not job.plan.derived.shard:
            if not job.group.is_rank_0 and (job.run / "plan.json").exists():
                with suppress(Gpt2boxError):  # the run ends because memory ran out, not because of this
                    save_checkpoint(job.run / "checkpoints", job.model, job.optimizer, job.state, job.tokenizer)
            self.writer.save(job.state)
        self.saved_step = job.state.step

    @contextmanager
    def saving_on_oom(self) -> Iterator[None]:
        """Save before an out-of-memory error of the block ends the run."""
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            if self.is_unsaved:
                self.save_from_any_rank()
            raise
