"""What `gpt2box bench --sweep` measured here, kept in volumes/runs/bench.json; planning takes it before an estimate.

A record holds for one card (or CPU), one version of PyTorch, one shape, number format and set of settings that cost
time.
Importable without torch.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt2box.config.schema import Config
from gpt2box.model.shape import ModelShape
from gpt2box.utils.files import read_object, write_atomically

FORMAT = 1
MIN_SPEEDUP = 1.05  # times as fast: less may be chance
LONG_STEP_MICRO_STEPS = 3  # micro-steps of the longer of the two steps that are measured
# Of a step's time and memory, besides shape, number format and the way it is done.
COST_SETTINGS = (
    "dropout", "loss_chunk_tokens", "weights_dtype", "optimizer", "optimizer_states", "optimizer_in_backward",
    "lora_rank", "deterministic",
)  # fmt: skip


@dataclass(frozen=True)
class BenchKey:
    """What was measured, and where. Records of an equal one hold."""

    card: str
    torch: str
    shape: dict[str, Any]
    dtype: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class BenchRecord:
    """A way to do the steps, and how long they took; or that there was too little memory for it."""

    job: BenchKey
    micro_batch_size: int
    activation_checkpointing: str
    compiled: bool
    fits: bool
    free_bytes: int  # on the card, when that was seen
    peak_bytes: int  # with CUDA's own; 0 on a CPU, where it cannot be told from the rest of the process
    one_s: float  # a step of one micro-step
    many_s: float  # of MANY
    when: str = ""
    gpt2box: str = ""

    @property
    def way(self) -> tuple[int, str, bool]:
        """What the record is about."""
        return self.micro_batch_size, self.activation_checkpointing, self.compiled

    def step_s(self, grad_accum_steps: int) -> float:
        """Seconds a step: each further micro-step takes the same."""
        further = (self.many_s - self.one_s) / (LONG_STEP_MICRO_STEPS - 1)
        if further <= 0:  # a short step on a busy machine
            further = self.many_s / LONG_STEP_MICRO_STEPS
        return self.one_s + (grad_accum_steps - 1) * further

    def tokens_per_sec(self, grad_accum_steps: int) -> float:
        """In a step of so many micro-steps."""
        tokens = self.micro_batch_size * int(self.job.shape["block_size"]) * grad_accum_steps
        return tokens / self.step_s(grad_accum_steps)


def bench_key(card: str, config: Config, shape: ModelShape, dtype: str) -> BenchKey:
    """What a measurement of these settings on that card holds for."""
    settings = {key: getattr(config, key) for key in COST_SETTINGS}
    return BenchKey(card, importlib.metadata.version("torch"), asdict(shape), dtype, settings)


def read_bench_records(path: Path, card: str) -> list[BenchRecord]:
    """All that was measured on a card, with the version of PyTorch that is here; nothing from a damaged file."""
    found = []
    rows = read_object(path).get("measured")
    for row in rows if isinstance(rows, list) else []:
        try:
            record = BenchRecord(**{**row, "job": BenchKey(**row["job"])})
            whole = record.many_s > 0 and record.one_s > 0 if record.fits else record.free_bytes > 0
            if whole and record.job.card == card and record.job.torch == importlib.metadata.version("torch"):
                found.append(record)
        except (TypeError, KeyError):
            continue
    return found


def store_bench_records(path: Path, records: list[BenchRecord]) -> None:
    """Add records to the file, in place of older ones of the same job and way."""
    new = {(json.dumps(asdict(record.job)), record.way) for record in records}
    rows = read_object(path).get("measured")
    kept = (
        [row for row in rows if isinstance(row, dict) and row_identity(row) not in new]
        if isinstance(rows, list)
        else []
    )
    content = {"format": FORMAT, "measured": [*kept, *map(asdict, records)]}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def row_identity(row: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
    """A stored record's job and way."""
    keys = ("micro_batch_size", "activation_checkpointing", "compiled")
    return json.dumps(row.get("job")), tuple(row.get(key) for key in keys)


def should_compile(records: list[BenchRecord], job: BenchKey, tokens_per_step: int, usual: bool) -> bool:
    """Whether to compile: as usual, unless the fastest way of a job that is done otherwise is clearly faster."""
    best = {True: 0.0, False: 0.0}
    for record in records:
        if record.job == job and record.fits:
            accumulation = max(tokens_per_step // (record.micro_batch_size * int(job.shape["block_size"])), 1)
            best[record.compiled] = max(best[record.compiled], record.tokens_per_sec(accumulation))
    if not best[usual]:
        return usual
    return (not usual) if best[not usual] > MIN_SPEEDUP * best[usual] else usual
