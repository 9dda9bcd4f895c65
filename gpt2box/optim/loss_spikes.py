"""Steps that must not reach the weights: a loss or gradient not finite, or a loss far above those of the steps before.

All is counted and compared on the device, so that nobody waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2box.planner.run_plan import RunPlan

MOST_BAD_STEPS = 5  # in a row, after which a run goes back to a checkpoint
HISTORY = 128  # steps that a step's loss is compared with; before there are as many, it is not
LEAST_DEVIATION = 1.0  # of the sequences' losses, in nats
ODD_ONE = 2.0  # times spike_sigma: how far above the others' a single one may be; 12 is more than a guess costs


class BadSteps:
    """Device scalars, float32, and the losses of the last HISTORY steps.

    A loss is a spike where it is more than `spike_sigma` standard deviations above the mean of those before, as in
    OLMo-core's SkipStepOptimizer (Groeneveld et al.). The deviation is not taken for less than what chance makes of a
    step's few sequences: where all is known by heart it is next to nothing, and one odd passage would be a spike. A
    spike is remembered as the highest loss that would have been none: a text with rare hard passages soon has
    room for them, and a loss that rose for good still gives MOST_BAD_STEPS in a row.
    """

    def __init__(
        self,
        device: torch.device,
        spike_sigma: float = 0.0,
        sequences: int = 1,
        in_a_row: int = 0,
        losses: Sequence[float] = (),
    ) -> None:
        self.spike_sigma, self._sequences = spike_sigma, sequences
        self.in_a_row = torch.full((), float(in_a_row), device=device)  # from MOST_BAD_STEPS on, good ones count, too
        self.all = torch.zeros((), device=device)
        self.spikes = torch.zeros((), device=device)  # of all
        self.spikes_in_a_row = torch.zeros((), device=device)
        known = [*[math.nan] * HISTORY, *losses][-HISTORY:]  # of which nothing follows as long as one is missing
        self._losses = torch.tensor(known, device=device)

    @classmethod
    def of(cls, plan: RunPlan, in_a_row: int = 0, losses: Sequence[float] = ()) -> BadSteps:
        """Make the counters of a run, as they were at a checkpoint or new."""
        device = torch.device(plan.device)
        return cls(device, plan.spike_sigma, plan.sequences_per_step, in_a_row, losses)

    def limit(self, micro_steps: int = 1) -> Tensor:
        """The highest loss that is no spike; not a number, which none is above, where too few are known.

        Of one of a step's `micro_steps` the loss has a deviation that is larger by their root.
        """
        if not self.spike_sigma:
            return torch.full_like(self.all, math.inf)
        sequences, root = self._sequences / micro_steps, math.sqrt(micro_steps)
        least = max(LEAST_DEVIATION / math.sqrt(sequences), ODD_ONE / sequences)
        deviation, mean = torch.std_mean(self._losses)
        return mean.add(deviation.clamp(min=least / root), alpha=self.spike_sigma * root)

    def count(self, loss: Tensor, limit: Tensor, bad: Tensor, finite: Tensor) -> None:
        """Take in a step: `bad` is 1 where it was left out, else 0; `finite`, whether its loss and gradient were."""
        counted = torch.where(self.in_a_row < MOST_BAD_STEPS, bad, 1.0)
        self.in_a_row = torch.addcmul(counted, self.in_a_row, counted)
        self.all = self.all + bad
        if self.spike_sigma:
            spike = bad * finite
            self.spikes, self.spikes_in_a_row = self.spikes + spike, (self.spikes_in_a_row + spike) * counted
            later = torch.cat([self._losses[1:], torch.fmin(loss.detach(), limit).view(1)])
            self._losses = torch.where(finite, later, self._losses)

    @property
    def since(self) -> int:
        """Steps since there were MOST_BAD_STEPS in a row, that one included; 0 where there were not. Waits for it."""
        return max(int(self.in_a_row) - MOST_BAD_STEPS + 1, 0)

    @property
    def recent_losses(self) -> list[float]:
        """Those that are known, the latest last. Waits for them."""
        return [loss for loss in self._losses.tolist() if not math.isnan(loss)]
