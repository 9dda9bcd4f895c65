"""Make calls of a PyTorch operator run out of memory or return NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Refuse(TorchDispatchMode):
    """Raise OutOfMemoryError at the n-th call of an operator, and at later calls up to `times` in all."""

    def __init__(self, operator: str, nth: int, times: int = 1) -> None:
        super().__init__()
        self.operator, self.left, self.times = operator, nth, times
        self.refused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(f"aten.{self.operator}."):
            self.left -= 1
            if self.left <= 0 and self.refused < self.times:
                self.refused += 1
                raise torch.cuda.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


class Spoil(TorchDispatchMode):
    """Return NaN from those calls of an operator whose numbers, from 1, are in `which`."""

    def __init__(self, operator: str, which: range) -> None:
        super().__init__()
        self.operator, self.which, self.calls = operator, which, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += (here := str(func).startswith(f"aten.{self.operator}."))
        out = func(*args, **(kwargs or {}))
        return out * float("nan") if here and self.calls in self.which else out
