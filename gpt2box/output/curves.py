"""The curves of a run, from its metrics.jsonl: read once, line by line, and thinned to what a picture can show."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt2box.training.metrics import stream

POINTS = 2000  # of a drawn curve: about the pixels of a screen
TRAIN = ("loss", "learning_rate", "grad_norm", "tokens_per_sec", "peak_memory_bytes")
EVAL = ("val_loss",)
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Finite values by step; `hours` since the run's first line, by the clock."""

    step: Numbers  # (N,), rising
    hours: Numbers  # (N,), never falling
    value: Numbers  # (N,)

    def thinned(self, points: int = POINTS) -> Curve:
        """At most about so many points that draw the same picture."""
        kept = picture(self.value, points)
        return Curve(self.step[kept], self.hours[kept], self.value[kept])


@dataclass(frozen=True)
class History:
    """What a metrics.jsonl tells."""

    curves: dict[str, Curve]  # those of TRAIN and EVAL that have a finite value
    lines: int
    left_out: int  # values that are no finite number
    val_sets: list[str]  # names of the windows that val_loss is over, in order of appearance

    def best(self) -> tuple[float, int] | None:
        """The least val_loss and its step."""
        if (curve := self.curves.get("val_loss")) is None:
            return None
        at = int(curve.value.argmin())
        return float(curve.value[at]), int(curve.step[at])


def history(path: Path) -> History:
    """Read a metrics.jsonl, also one that is being written or whose last line is torn; 1,000,000 lines in seconds."""
    names = {"train": TRAIN, "eval": EVAL}
    flat = {kind: array("d") for kind in names}  # 8 bytes a number, where a row in Python takes hundreds
    val_sets: dict[str, None] = {}
    for row in stream(path):
        if (numbers := flat.get(row["kind"])) is not None:
            wanted = [row["step"], row.get("time"), *map(row.get, names[row["kind"]])]
            try:
                numbers.fromlist(wanted)  # all or nothing
            except TypeError:
                numbers.fromlist([number(value) for value in wanted])
            if "val_set" in row:
                val_sets[str(row["val_set"])] = None
    tables = {kind: np.array(numbers).reshape(-1, 2 + len(names[kind])) for kind, numbers in flat.items()}
    times = np.concatenate([table[:, 1] for table in tables.values()])
    begun = min(times[np.isfinite(times)], default=0.0)
    curves, left_out = {}, 0
    for kind, table in tables.items():
        table = table[np.argsort(table[:, 0], kind="stable")]
        hours = np.maximum.accumulate(np.nan_to_num(table[:, 1] - begun)) / 3600  # a clock may be set back
        for name, value in zip(names[kind], table[:, 2:].T, strict=True):
            finite = np.isfinite(value)
            left_out += int((~finite).sum())
            if finite.any():
                curves[name] = Curve(table[finite, 0], hours[finite], value[finite])
    return History(curves, sum(map(len, tables.values())), left_out, list(val_sets))


def number(value: object) -> float:
    """NaN for what is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def picture(values: Numbers, points: int) -> npt.NDArray[np.intp]:
    """Indices of the first, the last, and the least and the greatest of each of points / 2 stretches; all of few."""
    count = len(values)
    if count <= points:
        return np.arange(count)
    starts = np.linspace(0, count, points // 2 + 1).astype(np.intp)
    kept = [0, count - 1]
    for start, end in pairwise(starts):
        stretch = values[start:end]
        kept += [start + int(stretch.argmin()), start + int(stretch.argmax())]
    return np.unique(np.array(kept, dtype=np.intp))
