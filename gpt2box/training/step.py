"""One optimizer step: micro-batches, forward and backward passes, gradient accumulation, update.

train, bench and verify take their steps with the same StepExecutor.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2box.checkpoint.metadata import TrainState
from gpt2box.data.dataloader import TrainWindows, copy_to_device, count_loss_targets, inputs_and_targets, micro_batches
from gpt2box.data.dataset import Dataset
from gpt2box.distributed.group import RankGroup
from gpt2box.model.gpt2 import GPT2
from gpt2box.optim.clipped_step import make_optimizer_step
from gpt2box.optim.factory import Optimizer
from gpt2box.optim.loss_spikes import BadStepCounter
from gpt2box.optim.schedule import learning_rate_at
from gpt2box.planner.run_plan import RunPlan
from gpt2box.system.device import translate_cuda_oom
from gpt2box.training.evaluate import autocast
from gpt2box.training.model_setup import compile_model, configure
from gpt2box.training.rollback import TooManyBadSteps
from gpt2box.utils.ranks import SINGLE_PROCESS


class StepResult(NamedTuple):
    """The figures of a step. The tensors stay on the device until somebody reads them."""

    loss: Tensor
    learning_rate: float
    grad_norm: Tensor


class StepExecutor:
    """Takes the steps of a run, as its plan says: a step always sees tokens_per_step tokens."""

    def __init__(
        self,
        plan: RunPlan,
        model: GPT2,
        optimizer: Optimizer,
        dataset: Dataset,
        state: TrainState,
        group: RankGroup | None = None,
        check_dataset: Callable[[], None] = lambda: None,
    ) -> None:
        """`check_dataset`: raises Damaged if the dataset is no longer the one that the run began with."""
        self.plan, self.model, self.optimizer = plan, model, optimizer
        self.dataset, self.state, self.group = dataset, state, group or RankGroup(SINGLE_PROCESS)
        self.batches: Generator[Tensor, None, None] | None = None
        self._check_dataset = check_dataset
        self._forwards: dict[bool, Any] = {}  # by whether it is compiled
        configure(model, plan)
        counter = BadStepCounter.from_plan(plan, state.bad_steps, state.recent_losses)
        self.optimizer_step = make_optimizer_step(optimizer, plan, counter)

    @property
    def forward(self) -> Any:
        """Return the model, compiled and wrapped for several ranks as the plan says."""
        compiled = self.plan.execution.compile and not self.plan.derived.shard  # FSDP2 compiles block by block
        if compiled not in self._forwards:
            module = compile_model(self.model) if compiled else self.model
            self._forwards[compiled] = self.group.wrap_ddp(self.model, module)
        return self._forwards[compiled]

    def use_plan(self, plan: RunPlan, keep_batches: bool = False) -> None:
        """Take the next steps as another plan says. The counts of bad steps go on.

        `keep_batches`: go on reading where the last step ended, which must have been taken completely.
        """
        self.optimizer_step.close()
        if not keep_batches:
            self._close_batches()
        self.plan = plan
        configure(self.model, plan)
        self.optimizer_step = make_optimizer_step(self.optimizer, plan, self.optimizer_step.bad_steps)

    @translate_cuda_oom()
    def take(self) -> StepResult:
        """Take one step and count it in the state.

        PyTorch's AdamW changes the weights at the end only; LowMemoryAdamW may stop half-way (`is_step_unfinished`).

        Raises:
            torch.cuda.OutOfMemoryError: the step was not taken. Close the executor or call use_plan before the next.
        """
        plan, state = self.plan, self.state
        device, micro_steps = torch.device(plan.derived.device), plan.execution.grad_accum_steps
        if plan.config.dropout:
            # A seed for each step and rank: resuming needs no generator state.
            torch.manual_seed(plan.config.seed + state.step + (self.group.ranks.rank << 40))
        lr = learning_rate_at(state.step, plan)
        if self.batches is None:
            self.batches = self.open_batches()
        batches: Iterable[Tensor] = (next(self.batches) for _ in range(micro_steps))
        weights = None
        if self.dataset.masked:
            batches = list(batches)
            weights = target_shares(batches, self.group)
        forward = self.forward
        loss = torch.zeros((), device=device)
        for micro_step, batch in enumerate(batches):
            inputs, targets = inputs_and_targets(copy_to_device(batch, device))  # (B, T)
            with self.group.gradient_sync(forward, is_last=micro_step == micro_steps - 1):
                with autocast(plan):
                    micro_loss = forward(inputs, targets, 1.0 / micro_steps)
                self.optimizer_step.before_backward(state.step, micro_step, lr, micro_loss)  # unweighted, for spikes
                if weights is not None:
                    micro_loss = micro_loss * weights[micro_step]
                micro_loss.backward()
            loss += micro_loss.detach()
        loss = self.group.all_reduce_mean(loss)
        grad_norm = self.optimizer_step(loss)
        state.step += 1
        return StepResult(loss, lr, grad_norm)

    def check_bad_steps(self) -> None:
        """Count the steps that reached the weights, and stop after too many that did not.

        Called before each save and evaluation, so that the outcome does not depend on when the counts are read.

        Raises:
            TooManyBadSteps: too many consecutive steps were bad (loss_spikes.py).
        """
        state, bad_steps = self.state, self.optimizer_step.bad_steps
        # AdamW's own count leaves out bad steps.
        state.optimizer_steps = max((int(entry["step"]) for entry in [*self.optimizer.state.values()][:1]), default=0)
        state.bad_steps, state.recent_losses = int(bad_steps.consecutive), bad_steps.recent_losses
        if since := bad_steps.steps_since_too_many:
            first = state.step - since + 1
            raise TooManyBadSteps(first, self.optimizer_step.skip_note, int(bad_steps.consecutive_spikes))

    def close(self) -> None:
        """Stop reading batches and remove the optimizer's hooks."""
        self.optimizer_step.close()
        self._close_batches()

    def _close_batches(self) -> None:
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def open_batches(self) -> Generator[Tensor, None, None]:
        """Open the micro-batches from the current step on."""
        self._check_dataset()
        plan, state = self.plan, self.state
        micro_batch_size = plan.execution.micro_batch_size
        first_of_step = state.data_step * plan.sequences_per_step
        return micro_batches(
            self.dataset.folder / "train.bin",
            TrainWindows(self.dataset.tokens("train"), plan.shape.block_size, plan.config.seed),
            plan.shape.vocab_size,
            first_sequence=first_of_step + self.group.ranks.rank * micro_batch_size,
            micro_batch_size=micro_batch_size,
            pin=torch.device(plan.derived.device).type == "cuda",
            ranks=plan.execution.ranks,
        )


def target_shares(batches: list[Tensor], group: RankGroup) -> list[float]:
    """Compute the factors that turn the micro-batches' mean losses into a mean over all counted targets of a step."""
    counts = [count_loss_targets(batch) for batch in batches]
    (all_counts,) = group.all_reduce_sum(sum(counts))
    return [count * len(counts) * group.ranks.world_size / max(all_counts, 1) for count in counts]
