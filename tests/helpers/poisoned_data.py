"""Make the data windows of some steps give a NaN loss, however often they are read."""

from __future__ import annotations

import math

from torch import Tensor

from gpt2box.data import dataloader
from gpt2box.model.gpt2 import GPT2


def poison_data(first: int, last: int) -> None:
    """Poison the data of steps `first` to `last` of all runs in this process."""
    starts = set()
    plain_start = dataloader.TrainWindows.start
    plain_forward = GPT2.forward
    read = dataloader.read_windows
    poisoned: set[bytes] = set()

    def start(self: dataloader.TrainWindows, sequence: int) -> int:
        found = plain_start(self, sequence)
        if first * 8 <= sequence < (last + 1) * 8:  # 8 windows per step, as with helpers/settings.py's TINY
            starts.add(found)
        return found

    def read_windows(file, wanted, block_size, vocab_size):  # type: ignore[no-untyped-def]
        windows = read(file, wanted, block_size, vocab_size)
        for begin, window in zip(wanted, windows, strict=True):
            if begin in starts:
                poisoned.add(window[:-1].numpy().tobytes())
        return windows

    def forward(self: GPT2, ids: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        loss = plain_forward(self, ids, targets, scale)
        return loss * math.nan if any(row.int().numpy().tobytes() in poisoned for row in ids) else loss

    dataloader.TrainWindows.start = start  # type: ignore[method-assign]
    dataloader.read_windows = read_windows
    GPT2.forward = forward  # type: ignore[method-assign]
