"""Decisions that depend on signals and clocks, made by all ranks at the same step."""

from typing import Any

import torch
import torch.distributed as dist

from gpt2box.distributed.group import RankGroup
from gpt2box.utils.signals import StopRequest


class Consensus:
    """Agreement of all ranks on when to stop and when to save, whichever rank asked first.

    At each step every rank starts an all-reduce of its requests and reads the result of the step before, which has
    long arrived: no step waits for the network.
    """

    def __init__(self, stop: StopRequest, group: RankGroup) -> None:
        self._stop, self._group = stop, group
        self._requests = torch.zeros(2, dtype=torch.int64)  # stop, save
        self._pending: Any = None
        self._agreed_to_stop = False
        self.should_save = False

    @property
    def should_stop(self) -> bool:
        """Return whether all ranks stop at this step."""
        return bool(self._stop) if self._group.is_single_process else self._agreed_to_stop

    def update(self, wants_save: bool) -> None:
        """Exchange requests with the other ranks. All ranks call it once a step."""
        self.should_save = wants_save
        if self._group.is_single_process:
            return
        self.wait()
        stop, self.should_save = map(bool, self._requests.tolist())
        if stop:
            self._agreed_to_stop = True
            self._stop.name = self._stop.name or "a signal to another rank"
            return
        self._requests = torch.tensor([bool(self._stop), wants_save and not self.should_save], dtype=torch.int64)
        control_group = self._group.control_group
        self._pending = dist.all_reduce(self._requests, dist.ReduceOp.MAX, group=control_group, async_op=True)

    def wait(self) -> None:
        """Wait for the exchange in flight."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
