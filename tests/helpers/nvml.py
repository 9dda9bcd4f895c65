"""Choose the machine that NVML's stand-in shows."""

from __future__ import annotations

from collections.abc import Callable

Scene = Callable[[str], None]
