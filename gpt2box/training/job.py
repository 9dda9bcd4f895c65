"""What a training job works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gpt2box.checkpoint.async_writer import StagingBuffer
from gpt2box.checkpoint.metadata import TrainState
from gpt2box.data.dataset import Dataset
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.distributed.group import RankGroup
from gpt2box.model.gpt2 import GPT2
from gpt2box.optim.factory import Optimizer
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.run_plan import RunPlan
from gpt2box.training.console import Display
from gpt2box.utils.signals import StopRequest


@dataclass
class Job:
    """A run that is being trained. A fallback replaces `plan`, a rollback replaces `state`."""

    run: Path
    plan: RunPlan
    model: GPT2
    optimizer: Optimizer
    dataset: Dataset
    tokenizer: Tokenizer
    state: TrainState
    stop: StopRequest
    sample: Callable[[Display, int], None]  # called after each evaluation
    started_from_weights: bool  # the weights before the first step are worth a checkpoint
    group: RankGroup
    fallback_plans: list[ExecutionPlan]  # fastest first, for out-of-memory errors
    larger_plans: list[ExecutionPlan] = field(default_factory=list)  # given up, the first one first
    retry_steps: int = 0  # steps until the last larger plan is tried again
    retry_at: int = 0  # the step at which it is
    lock_mark: str = ""  # of the run's lock; empty: none is held
    check_dataset: Callable[[], None] = lambda: None  # raises Damaged if it is not what the run began with
    staging_buffer: StagingBuffer | None = None  # reused after a rollback
