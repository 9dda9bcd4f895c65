"""Measurements of `gpt2box bench --sweep`, stored in volumes/runs/bench.json. Importable without torch.

Planning prefers them to its own estimates. A record applies to one GPU (or CPU), PyTorch version, model shape, dtype
and set of settings that affect a step's cost.
"""

import importlib.metadata
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt2box.config.schema import Config
from gpt2box.model.shape import ModelShape
from gpt2box.utils.files import read_json_object, write_atomically

FORMAT = 1
MIN_SPEEDUP = 1.05  # a smaller difference may be noise
LONG_STEP_MICRO_STEPS = 3  # micro-steps of the longer of the two timed steps
# Settings that affect a step's time or memory, besides the shape, the dtype and the execution plan.
COST_SETTINGS = (
    "dropout", "loss_chunk_tokens", "weights_dtype", "optimizer", "optimizer_states", "optimizer_in_backward",
    "lora_rank", "deterministic",
)  # fmt: skip


@dataclass(frozen=True)
class BenchKey:
    """The measured job and the device. Field names are those of bench.json."""

    card: str
    torch: str
    shape: dict[str, Any]
    dtype: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class BenchRecord:
    """The measured cost of one execution plan, or that it ran out of memory. Field names are those of bench.json."""

    job: BenchKey
    micro_batch_size: int
    activation_checkpointing: str
    compiled: bool
    fits: bool
    free_bytes: int  # on the device, before the measurement
    peak_bytes: int  # with the CUDA context; 0 on a CPU, where the process's other memory cannot be told apart
    one_s: float  # seconds of a step of one micro-step
    many_s: float  # seconds of a step of LONG_STEP_MICRO_STEPS
    when: str = ""
    gpt2box: str = ""

    @property
    def plan_key(self) -> tuple[int, str, bool]:
        """Identify the execution plan among the records of one job."""
        return self.micro_batch_size, self.activation_checkpointing, self.compiled

    def step_s(self, grad_accum_steps: int) -> float:
        """Extrapolate the seconds of a step: each further micro-step takes the same time."""
        further = (self.many_s - self.one_s) / (LONG_STEP_MICRO_STEPS - 1)
        if further <= 0:  # a short step on a busy machine
            further = self.many_s / LONG_STEP_MICRO_STEPS
        return self.one_s + (grad_accum_steps - 1) * further

    def tokens_per_sec(self, grad_accum_steps: int) -> float:
        """Return the speed of a step with this many micro-steps."""
        tokens = self.micro_batch_size * int(self.job.shape["block_size"]) * grad_accum_steps
        return tokens / self.step_s(grad_accum_steps)


def bench_key(device_name: str, config: Config, shape: ModelShape, dtype: str) -> BenchKey:
    """Return the key under which measurements of these settings on this device are stored."""
    settings = {key: getattr(config, key) for key in COST_SETTINGS}
    return BenchKey(device_name, importlib.metadata.version("torch"), asdict(shape), dtype, settings)


def read_bench_records(path: Path, device_name: str) -> list[BenchRecord]:
    """Read the records of a device and the installed PyTorch version. Skips damaged ones."""
    records = []
    rows = read_json_object(path).get("measured")
    for row in rows if isinstance(rows, list) else []:
        try:
            record = BenchRecord(**{**row, "job": BenchKey(**row["job"])})
            complete = record.many_s > 0 and record.one_s > 0 if record.fits else record.free_bytes > 0
            job = record.job
            if complete and job.card == device_name and job.torch == importlib.metadata.version("torch"):
                records.append(record)
        except (TypeError, KeyError):
            continue
    return records


def store_bench_records(path: Path, records: list[BenchRecord]) -> None:
    """Write records to the file, replacing older ones of the same job and execution plan."""
    new = {(json.dumps(asdict(record.job)), record.plan_key) for record in records}
    rows = read_json_object(path).get("measured")
    other = [row for row in rows if isinstance(row, dict) and row_key(row) not in new] if isinstance(rows, list) else []
    content = {"format": FORMAT, "measured": [*other, *map(asdict, records)]}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def row_key(row: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
    """Return the job and the execution plan of a stored record."""
    keys = ("micro_batch_size", "activation_checkpointing", "compiled")
    return json.dumps(row.get("job")), tuple(row.get(key) for key in keys)


def should_compile(records: list[BenchRecord], job: BenchKey, tokens_per_step: int, default: bool) -> bool:
    """Return `default`, unless the fastest measured plan of the other kind is clearly faster."""
    best = {True: 0.0, False: 0.0}
    for record in records:
        if record.job == job and record.fits:
            accumulation = max(tokens_per_step // (record.micro_batch_size * int(job.shape["block_size"])), 1)
            best[record.compiled] = max(best[record.compiled], record.tokens_per_sec(accumulation))
    if not best[default]:
        return default
    return (not default) if best[not default] > MIN_SPEEDUP * best[default] else default
