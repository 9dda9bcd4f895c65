"""The curves of a run, from its metrics.jsonl: read once, line by line, and thinned to what a picture can show."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt2box.runs.metrics import parse_rows

MAX_CURVE_POINTS = 2000  # of a drawn curve: about the pixels of a screen
TRAIN_FIELDS = ("loss", "learning_rate", "grad_norm", "tokens_per_sec", "peak_memory_bytes")
EVAL_FIELDS = ("val_loss",)
FIELDS_BY_KIND = {"train": TRAIN_FIELDS, "eval": EVAL_FIELDS}  # of lines, with their figures
READ_CHUNK_BYTES = 8 << 20  # read at a time
MIN_ARROW_BYTES = 1 << 20  # not worth the faster reader's start
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Finite values by step; `hours` since the run's first line, by the clock."""

    step: FloatArray  # (N,), rising
    hours: FloatArray  # (N,), never falling
    value: FloatArray  # (N,)

    def thinned(self, points: int = MAX_CURVE_POINTS) -> Curve:
        """At most about so many points that draw the same picture."""
        kept = downsample_indices(self.value, points)
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


def read_history(path: Path) -> History:
    """Read a metrics.jsonl, also one that is being written or whose last line is torn; 1,000,000 lines in seconds."""
    figures = CurveBuffer()
    if path.is_file():
        with open(path, "rb") as file:
            while piece := file.read(READ_CHUNK_BYTES):
                figures.add(piece + file.readline())
    return figures.history()


class CurveBuffer:
    """The numbers of a metrics.jsonl, which may grow piece by piece: 8 bytes each, where a row in Python takes 500."""

    def __init__(self) -> None:
        self._flat = {kind: array("d") for kind in FIELDS_BY_KIND}  # row by row: step, time, the kind's own
        self._val_sets: dict[str, None] = {}

    def add(self, lines: bytes) -> None:
        """Take in more lines. What is no line of a metrics.jsonl is left out."""
        if len(lines) < MIN_ARROW_BYTES or not self._add_at_once(lines):
            self._add_each(lines)

    def _add_at_once(self, lines: bytes) -> bool:
        """Three times as fast; not where a line is torn or holds what it should not."""
        import pyarrow
        from pyarrow import compute, json

        names = ["step", "time", *TRAIN_FIELDS, *EVAL_FIELDS]
        schema = pyarrow.schema([("kind", pyarrow.string()), ("val_set", pyarrow.string())])
        for name in names:
            schema = schema.append(pyarrow.field(name, pyarrow.float64()))
        try:
            table = json.read_json(
                pyarrow.BufferReader(lines),
                json.ReadOptions(use_threads=False, block_size=1 << 20),  # beside a training
                json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            )
        except pyarrow.ArrowInvalid:
            return False
        if table["step"].null_count:
            return False
        for kind, own in FIELDS_BY_KIND.items():
            part = table.filter(compute.equal(table["kind"], kind))
            columns = [part[name].to_numpy() for name in ("step", "time", *own)]
            self._flat[kind].frombytes(np.stack(columns, axis=1).astype(np.float64).tobytes())
        self._val_sets |= dict.fromkeys(name for name in table["val_set"].unique().to_pylist() if name)
        return True

    def _add_each(self, lines: bytes) -> None:
        for row in parse_rows(lines.decode("utf-8", errors="replace").splitlines()):
            if (numbers := self._flat.get(row["kind"])) is not None:
                wanted = [row["step"], row.get("time"), *map(row.get, FIELDS_BY_KIND[row["kind"]])]
                numbers.fromlist([to_float(value) for value in wanted])
                if "val_set" in row:
                    self._val_sets[str(row["val_set"])] = None

    def counts(self) -> list[int]:
        """Rows of each kind so far."""
        return [len(numbers) // (2 + len(FIELDS_BY_KIND[kind])) for kind, numbers in self._flat.items()]

    def history(self, since: Sequence[int] = (0, 0)) -> History:
        """Their curves; of those rows alone that came after so many of each kind."""
        # Not copied; nothing below keeps a view, which would keep the arrays from growing.
        tables = {
            kind: np.asarray(flat).reshape(-1, 2 + len(FIELDS_BY_KIND[kind])) for kind, flat in self._flat.items()
        }
        times = np.concatenate([table[:, 1] for table in tables.values()])
        begun = times.min(initial=math.inf, where=np.isfinite(times))
        curves, left_out, lines = {}, 0, 0
        for (kind, table), first in zip(tables.items(), since, strict=True):
            rows = table[first:]
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
            hours = (
                np.maximum.accumulate(np.nan_to_num(rows[:, 1] - begun, neginf=0.0)) / 3600
            )  # a clock may be set back
            lines += len(rows)
            for name, value in zip(FIELDS_BY_KIND[kind], rows[:, 2:].T, strict=True):
                finite = np.isfinite(value)
                left_out += int((~finite).sum())
                if finite.any():
                    curves[name] = Curve(rows[finite, 0], hours[finite], value[finite])
        return History(curves, lines, left_out, list(self._val_sets))


def to_float(value: object) -> float:
    """NaN for what is none, or none that fits."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def downsample_indices(values: FloatArray, points: int) -> npt.NDArray[np.intp]:
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
