"""The plan of a run: its settings, how its steps are executed, and what follows from both. Never imports torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from gpt2box.config.schema import Config
from gpt2box.model.shape import ModelShape
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.memory import max_evaluation_batch
from gpt2box.planner.search import MAX_MICRO_BATCH_TOKENS


@dataclass(frozen=True)
class Derived:
    """Values that follow from the settings, the model, the dataset and the device."""

    shape: ModelShape
    device: str
    dtype: str  # of matrix products: bfloat16 or float32
    deterministic: bool  # the same bits each time, on the same kind of device
    shard: bool  # ranks share weights, gradients and optimizer state
    lora_alpha: float
    min_lr: float
    warmup_steps: int
    decay_steps: int
    save_interval: int
    epochs: float
    checkpoint_bytes: int
    peak_tflops: float  # of all GPUs, in `dtype`; 0 if unknown


@dataclass(frozen=True)
class RunPlan:
    """The training loop reads nothing else. Only `execution` may change while a run trains."""

    config: Config
    execution: ExecutionPlan
    derived: Derived

    @property
    def shape(self) -> ModelShape:
        """Return the model's shape."""
        return self.derived.shape

    @property
    def sequences_per_step(self) -> int:
        """Count the sequences of a step, over all ranks."""
        return self.config.tokens_per_step // self.config.block_size

    @property
    def eval_batch_size(self) -> int:
        """Return the number of validation windows per batch: as many as fit in a step's memory.

        On a CPU a larger batch is slower, because it does not fit in the caches.
        """
        micro_batch_size = self.execution.micro_batch_size
        if self.derived.device == "cpu":
            return micro_batch_size
        most = max(MAX_MICRO_BATCH_TOKENS // self.shape.block_size, 1)
        memory = self.execution.memory.components()
        fits = max_evaluation_batch(self.shape, self.derived.dtype, self.config.loss_chunk_tokens, memory)
        return max(min(fits, most), micro_batch_size)

    def mfu(self, tokens_per_sec: float) -> float | None:
        """Compute the model FLOPs utilization (Chowdhery et al. 2022, appendix B).

        None if the peak is unknown, or if LoRA forms the gradients of some weights only.
        """
        peak_tflops = self.derived.peak_tflops
        if not peak_tflops or self.config.lora_rank:
            return None
        return round(tokens_per_sec * self.shape.flops_per_token / (peak_tflops * 1e12), 4)

    def with_settings(self, **settings: Any) -> RunPlan:
        """Return this plan with other settings; nothing is derived anew."""
        return replace(self, config=self.config.model_copy(update=settings))

    def with_execution(self, **values: Any) -> RunPlan:
        """Return this plan with another micro-batch, accumulation, activation checkpointing or compilation."""
        return replace(self, execution=replace(self.execution, **values))

    def with_derived(self, **values: Any) -> RunPlan:
        """Return this plan for another device, say."""
        return replace(self, derived=replace(self.derived, **values))

    def as_dict(self) -> dict[str, Any]:
        """Flatten the plan for plan.json. Resolved values take the place of `auto` and of defaults left open."""
        execution = self.execution
        return {
            **self.config.model_dump(mode="json"),
            **asdict(self.derived),
            "parameters": self.shape.parameters,
            "sequences_per_step": self.sequences_per_step,
            "eval_batch_size": self.eval_batch_size,
            "micro_batch_size": execution.micro_batch_size,
            "grad_accum_steps": execution.grad_accum_steps,
            "activation_checkpointing": execution.activation_checkpointing,
            "compile": execution.compile,
            "ranks": execution.ranks,
            "memory": execution.memory.components(),
            "expected_tokens_per_sec": execution.tokens_per_sec,
            "speed_measured": execution.measured,
        }


def make_run_plan(
    config: Config,
    shape: ModelShape,
    train_tokens: int,
    device: str,
    dtype: str,
    execution: ExecutionPlan,
    peak_tflops: float = 0.0,
) -> RunPlan:
    """Derive a run's plan. `peak_tflops`: of one GPU, in `dtype`."""
    on_cpu = device.partition(":")[0] == "cpu"
    warmup_steps = min(2000, config.max_steps // 50) if config.warmup_steps is None else config.warmup_steps
    derived = Derived(
        shape=shape,
        device=device,
        dtype=dtype,
        deterministic=on_cpu if config.deterministic == "auto" else config.deterministic,
        shard=config.shard and execution.ranks > 1,
        lora_alpha=2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        min_lr=config.learning_rate / 10 if config.min_lr is None else config.min_lr,
        warmup_steps=warmup_steps,
        decay_steps=config.decay_steps or config.max_steps,
        save_interval=config.save_interval or config.eval_interval,
        epochs=config.max_steps * config.tokens_per_step / max(train_tokens, 1),
        checkpoint_bytes=shape.checkpoint_bytes(
            config.weights_dtype, config.optimizer, config.optimizer_states, config.lora_rank
        ),
        peak_tflops=peak_tflops * execution.ranks,
    )
    return RunPlan(config, execution, derived)
