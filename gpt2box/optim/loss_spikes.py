"""Detection of bad steps: a non-finite loss or gradient, or a loss far above those of recent steps.

Everything is computed and counted on the device, so that no step waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2box.planner.run_plan import RunPlan

MAX_CONSECUTIVE_BAD_STEPS = 5  # then the run rolls back to a checkpoint
HISTORY = 128  # losses that define a spike; until there are as many, no step counts as one
MIN_SEQUENCE_DEVIATION = 1.0  # assumed lower bound for the deviation of sequence losses, in nats
MAX_SEQUENCE_RISE = 2.0  # × spike_sigma: rise of a single sequence's loss that is tolerated; 12 is worse than guessing


class BadStepCounter:
    """Counts non-finite steps and loss spikes, in float32 device scalars, and holds the losses of recent steps.

    A loss is a spike if it is more than `spike_sigma` standard deviations above the mean of the last HISTORY losses, as
    in OLMo-core's SkipStepOptimizer (Groeneveld et al.). The deviation has a lower bound, which follows from the number
    of sequences per step: on a memorized dataset it is almost zero, and one unusual passage would count as a spike.
    A spike enters the history as the highest loss that would not have been one: a text with rare hard passages soon
    has room for them, and a loss that rose for good still gives MAX_CONSECUTIVE_BAD_STEPS.
    """

    def __init__(
        self,
        device: torch.device,
        spike_sigma: float = 0.0,
        sequences: int = 1,
        consecutive: int = 0,
        losses: Sequence[float] = (),
    ) -> None:
        self.spike_sigma, self._sequences = spike_sigma, sequences
        # From MAX_CONSECUTIVE_BAD_STEPS on, good steps count, too: see steps_since_too_many.
        self.consecutive = torch.full((), float(consecutive), device=device)
        self.total = torch.zeros((), device=device)
        self.spikes = torch.zeros((), device=device)  # of the total
        self.consecutive_spikes = torch.zeros((), device=device)
        history = [*[math.nan] * HISTORY, *losses][-HISTORY:]  # one NaN makes the limit NaN, which no loss exceeds
        self._losses = torch.tensor(history, device=device)

    @classmethod
    def from_plan(cls, plan: RunPlan, consecutive: int = 0, losses: Sequence[float] = ()) -> BadStepCounter:
        """Make the counters of a run: new, or with the values that a checkpoint holds."""
        device = torch.device(plan.derived.device)
        return cls(device, plan.config.spike_sigma, plan.sequences_per_step, consecutive, losses)

    def spike_limit(self, micro_steps: int = 1) -> Tensor:
        """Return the highest loss that is not a spike; NaN while the history is too short.

        The loss of one of a step's `micro_steps` has a deviation that is larger by √micro_steps.
        """
        if not self.spike_sigma:
            return torch.full_like(self.total, math.inf)
        sequences, root = self._sequences / micro_steps, math.sqrt(micro_steps)
        min_deviation = max(MIN_SEQUENCE_DEVIATION / math.sqrt(sequences), MAX_SEQUENCE_RISE / sequences)
        deviation, mean = torch.std_mean(self._losses)
        return mean.add(deviation.clamp(min=min_deviation / root), alpha=self.spike_sigma * root)

    def record(self, loss: Tensor, spike_limit: Tensor, bad: Tensor, finite: Tensor) -> None:
        """Count a step. `bad`: 1 if it was skipped, else 0; `finite`: its loss and gradient were finite."""
        counted = torch.where(self.consecutive < MAX_CONSECUTIVE_BAD_STEPS, bad, 1.0)
        self.consecutive = torch.addcmul(counted, self.consecutive, counted)
        self.total = self.total + bad
        if self.spike_sigma:
            spike = bad * finite
            self.spikes = self.spikes + spike
            self.consecutive_spikes = (self.consecutive_spikes + spike) * counted
            later = torch.cat([self._losses[1:], torch.fmin(loss.detach(), spike_limit).view(1)])
            self._losses = torch.where(finite, later, self._losses)

    @property
    def steps_since_too_many(self) -> int:
        """Steps since MAX_CONSECUTIVE_BAD_STEPS was reached, that step included; 0 if it was not. Waits for the GPU."""
        return max(int(self.consecutive) - MAX_CONSECUTIVE_BAD_STEPS + 1, 0)

    @property
    def recent_losses(self) -> list[float]:
        """The losses in the history, the latest last. Waits for the GPU."""
        return [loss for loss in self._losses.tolist() if not math.isnan(loss)]
