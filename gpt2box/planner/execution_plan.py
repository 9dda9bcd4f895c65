"""How a device performs the optimizer step: the one thing that memory decides. Importable without torch."""

from dataclasses import dataclass

from gpt2box.planner.memory import MemoryEstimate


@dataclass(frozen=True)
class ExecutionPlan:
    """One way to perform the optimizer step. All plans of a run process the same tokens per step."""

    micro_batch_size: int
    grad_accum_steps: int  # micro-steps per optimizer step on each rank
    activation_checkpointing: str
    memory: MemoryEstimate
    tokens_per_sec: float  # expected, of all ranks together; 0: no figure for this device
    ranks: int = 1
    measured: bool = False  # tokens_per_sec was measured on this machine
    measured_bytes: int = 0  # peak memory measured on this machine; 0: not measured
    compile: bool = False

    @property
    def total_bytes(self) -> int:
        """Memory that must be free: the measured peak if there is one, else the estimate."""
        return self.measured_bytes or self.memory.total

    def describe(self) -> str:
        """Format the plan as settings."""
        return f"micro_batch_size {self.micro_batch_size}, activation_checkpointing {self.activation_checkpointing}"
