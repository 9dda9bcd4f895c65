"""Steps whose loss or gradient was not finite, counted on the device, so that nobody waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_BAD_STEPS = 5  # in a row, after which a run goes back to a checkpoint


class BadSteps:
    """All are device scalars, float32."""

    def __init__(self, device: torch.device, in_a_row: int = 0) -> None:
        self.in_a_row = torch.full((), float(in_a_row), device=device)
        self.all = torch.zeros((), device=device)
        self.since = torch.zeros((), device=device)  # steps since there were MOST_BAD_STEPS in a row, that one included

    def count(self, bad: Tensor) -> None:
        """Take in a step: 1 where it was bad, else 0."""
        self.in_a_row = (self.in_a_row + bad) * bad
        self.all = self.all + bad
        reached = (self.since > 0) | (self.in_a_row >= MOST_BAD_STEPS)
        self.since = torch.where(reached, self.since + 1, self.since)
