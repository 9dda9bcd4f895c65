"""Steps whose loss or gradient was not finite, counted on the device, so that nobody waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_BAD_STEPS = 5  # in a row, after which a run goes back to a checkpoint


class BadSteps:
    """Device scalars, float32."""

    def __init__(self, device: torch.device, in_a_row: int = 0) -> None:
        self.in_a_row = torch.full((), float(in_a_row), device=device)  # from MOST_BAD_STEPS on, good ones count, too
        self.all = torch.zeros((), device=device)

    def count(self, bad: Tensor) -> None:
        """Take in a step: 1 where it was bad, else 0."""
        counted = torch.where(self.in_a_row < MOST_BAD_STEPS, bad, 1.0)
        self.in_a_row = torch.addcmul(counted, self.in_a_row, counted)
        self.all = self.all + bad

    @property
    def since(self) -> int:
        """Steps since there were MOST_BAD_STEPS in a row, that one included; 0 where there were not. Waits for it."""
        return max(int(self.in_a_row) - MOST_BAD_STEPS + 1, 0)
