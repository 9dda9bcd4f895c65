"""How a device performs the optimizer step: the one thing that memory decides. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpt2box.planner.bench_records import BenchRecord
from gpt2box.planner.gpu_specs import GpuSpec
from gpt2box.planner.memory import Memory


@dataclass(frozen=True)
class ExecutionPlan:
    """One way to perform the optimizer step. All plans of a run process the same tokens per step."""

    micro_batch_size: int
    grad_accum_steps: int  # micro-steps per optimizer step on each rank
    activation_checkpointing: str
    memory: Memory
    tokens_per_sec: float  # expected, of all ranks together; 0: no figure for this device
    ranks: int = 1
    measured: bool = False  # tokens_per_sec was measured on this machine
    measured_bytes: int = 0  # peak memory measured on this machine; 0: not measured

    @property
    def total_bytes(self) -> int:
        """Memory that must be free: the measured peak if there is one, else the estimate."""
        return self.measured_bytes or self.memory.total

    def describe(self) -> str:
        """Format the plan as settings."""
        return f"micro_batch_size {self.micro_batch_size}, activation_checkpointing {self.activation_checkpointing}"


@dataclass(frozen=True)
class TargetDevice:
    """The device that a plan is made for."""

    name: str
    free_bytes: int
    spec: GpuSpec | None  # None: a CPU, or a GPU without data sheet figures
    dtype: str
    on_gpu: bool
    compiled: bool  # the model is compiled there if the settings allow it
    bench_name: str = ""  # the name in bench.json; empty: no measurements apply
    bench_records: list[BenchRecord] = field(default_factory=list)
    ranks: int = 1  # processes that share a step's sequences, each on such a device
