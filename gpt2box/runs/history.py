"""Read the curves of a run from metrics.jsonl, and downsample them for drawing."""

from __future__ import annotations

import math
import os
import secrets
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt2box.runs.metrics import parse_rows, to_number
from gpt2box.utils.files import open_regular

MAX_CURVE_POINTS = 2000  # of a drawn curve: about the pixels of a screen
FIELDS_BY_KIND = {  # numbers read of each kind of row
    "train": ("loss", "learning_rate", "grad_norm", "tokens_per_sec", "peak_memory_bytes"),
    "eval": ("val_loss",),
}
READ_CHUNK_BYTES = 8 << 20
MIN_ARROW_BYTES = 1 << 20  # below, importing pyarrow takes longer than it saves
MAX_READ_SECONDS = 0.5  # for one answer of the dashboard; the rest of a long file follows with the next
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Finite values by step."""

    step: FloatArray  # (N,), ascending
    hours: FloatArray  # (N,), since the run's first row by the wall clock, never descending
    value: FloatArray  # (N,)

    def downsampled(self, max_points: int = MAX_CURVE_POINTS) -> Curve:
        """Return about `max_points` points that draw the same picture."""
        indices = downsample_indices(self.value, max_points)
        return Curve(self.step[indices], self.hours[indices], self.value[indices])


@dataclass(frozen=True)
class History:
    """The contents of a metrics.jsonl."""

    curves: dict[str, Curve]  # by field; those with a finite value
    rows: int
    non_finite: int  # values left out
    val_sets: list[str]  # names of the validation windows behind val_loss, in order of appearance

    def best(self) -> tuple[float, int] | None:
        """Return the lowest val_loss and its step."""
        if (curve := self.curves.get("val_loss")) is None:
            return None
        at = int(curve.value.argmin())
        return float(curve.value[at]), int(curve.step[at])


def read_history(path: Path) -> History:
    """Read a metrics.jsonl, even while it is written or with a torn last line. 1,000,000 rows take seconds."""
    buffer = CurveBuffer()
    if path.is_file():
        with open(path, "rb") as file:
            while chunk := file.read(READ_CHUNK_BYTES):
                buffer.add(chunk + file.readline())
    return buffer.to_history()


class CurveBuffer:
    """Collects the numbers of a growing metrics.jsonl: 8 bytes each, where a row as a dict takes 500."""

    def __init__(self) -> None:
        self._flat = {kind: array("d") for kind in FIELDS_BY_KIND}  # row by row: step, time, the kind's fields
        self._val_sets: dict[str, None] = {}

    def add(self, lines: bytes) -> None:
        """Append lines. Invalid lines are skipped."""
        if len(lines) < MIN_ARROW_BYTES or not self._add_with_arrow(lines):
            self._add_row_by_row(lines)

    def _add_with_arrow(self, lines: bytes) -> bool:
        """Append lines three times as fast; return False, adding nothing, if one is invalid."""
        import pyarrow
        from pyarrow import compute, json

        names = ["step", "time", *(field for fields in FIELDS_BY_KIND.values() for field in fields)]
        schema = pyarrow.schema([("kind", pyarrow.string()), ("val_set", pyarrow.string())])
        for name in names:
            schema = schema.append(pyarrow.field(name, pyarrow.float64()))
        try:
            table = json.read_json(
                pyarrow.BufferReader(lines),
                json.ReadOptions(use_threads=False, block_size=1 << 20),  # leave the CPUs to training
                json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            )
        except pyarrow.ArrowInvalid:
            return False
        if table["step"].null_count:
            return False
        for kind, fields in FIELDS_BY_KIND.items():
            rows = table.filter(compute.equal(table["kind"], kind))
            columns = [rows[name].to_numpy() for name in ("step", "time", *fields)]
            self._flat[kind].frombytes(np.stack(columns, axis=1).astype(np.float64).tobytes())
        self._val_sets |= dict.fromkeys(name for name in table["val_set"].unique().to_pylist() if name)
        return True

    def _add_row_by_row(self, lines: bytes) -> None:
        for row in parse_rows(lines.decode("utf-8", errors="replace").splitlines()):
            if (flat := self._flat.get(row["kind"])) is not None:
                values = [to_number(row.get(name)) for name in ("step", "time", *FIELDS_BY_KIND[row["kind"]])]
                flat.fromlist([math.nan if value is None else value for value in values])
                if "val_set" in row:
                    self._val_sets[str(row["val_set"])] = None

    def row_counts(self) -> list[int]:
        """Return the number of rows of each kind."""
        return [len(flat) // (2 + len(FIELDS_BY_KIND[kind])) for kind, flat in self._flat.items()]

    def to_history(self, start_rows: Sequence[int] = (0, 0)) -> History:
        """Return the curves of the rows from `start_rows` on, a row number for each kind."""
        # No copies; and no view outlives this call, because a view would keep the arrays from growing.
        tables = {
            kind: np.asarray(flat).reshape(-1, 2 + len(FIELDS_BY_KIND[kind])) for kind, flat in self._flat.items()
        }
        times = np.concatenate([table[:, 1] for table in tables.values()])
        first_time = times.min(initial=math.inf, where=np.isfinite(times))
        curves, non_finite, row_count = {}, 0, 0
        for (kind, table), start in zip(tables.items(), start_rows, strict=True):
            rows = table[start:]
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
            seconds = np.nan_to_num(rows[:, 1] - first_time, neginf=0.0)
            hours = np.maximum.accumulate(seconds) / 3600  # the clock may have been set back
            row_count += len(rows)
            for name, value in zip(FIELDS_BY_KIND[kind], rows[:, 2:].T, strict=True):
                is_finite = np.isfinite(value)
                non_finite += int((~is_finite).sum())
                if is_finite.any():
                    curves[name] = Curve(rows[is_finite, 0], hours[is_finite], value[is_finite])
        return History(curves, row_count, non_finite, list(self._val_sets))


class MetricsTail:
    """Follows a growing metrics.jsonl; starts over when the file is replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.buffer = CurveBuffer()
        self.generation = ""  # changes when the file is replaced: row counts of an earlier one are void
        self.fraction_read = 1.0
        self._inode = self._offset = 0

    def read_new_rows(self) -> None:
        """Read appended rows for about MAX_READ_SECONDS. A line still being written is left for the next call."""
        try:
            with open(self.path, "rb", opener=open_regular) as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._offset:  # a resumed run replaces the file
                    self._reset(stat.st_ino)
                file.seek(self._offset)
                deadline = time.monotonic() + MAX_READ_SECONDS
                self.fraction_read = 1.0
                while lines := complete_lines(file.read(READ_CHUNK_BYTES) + file.readline()):
                    self.buffer.add(lines)
                    self._offset += len(lines)
                    if time.monotonic() > deadline and self._offset < stat.st_size:
                        self.fraction_read = self._offset / stat.st_size
                        break
        except OSError:
            if self._inode:
                self._reset(0)

    def _reset(self, inode: int) -> None:
        self.buffer, self._inode, self._offset = CurveBuffer(), inode, 0
        self.generation = secrets.token_hex(4)


def complete_lines(chunk: bytes) -> bytes:
    """Cut off an unfinished last line."""
    return chunk[: chunk.rfind(b"\n") + 1]


def downsample_indices(values: FloatArray, max_points: int) -> npt.NDArray[np.intp]:
    """Return the indices of the first and last value, and of the extremes of each of max_points / 2 intervals."""
    count = len(values)
    if count <= max_points:
        return np.arange(count)
    starts = np.linspace(0, count, max_points // 2 + 1).astype(np.intp)
    indices = [0, count - 1]
    for start, end in pairwise(starts):
        interval = values[start:end]
        indices += [start + int(interval.argmin()), start + int(interval.argmax())]
    return np.unique(np.array(indices, dtype=np.intp))
