"""Everything that follows from the settings, derived once. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpt2box.config.schema import Config
from gpt2box.model.shape import ModelShape
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.memory import max_evaluation_batch
from gpt2box.planner.search import MAX_MICRO_BATCH_TOKENS


@dataclass(frozen=True)
class RunPlan:
    """What the loop reads. Steps are optimizer updates, micro-steps one forward and backward pass."""

    shape: ModelShape
    dropout: float
    seed: int
    device: str
    dtype: str
    compile: bool
    activation_checkpointing: str
    loss_chunk_tokens: int
    weights_dtype: str
    optimizer_states: str
    optimizer_in_backward: bool
    lora_rank: int  # 0: all weights are trained
    lora_alpha: float

    micro_batch_size: int
    grad_accum_steps: int  # on each rank
    ranks: int  # processes that share a step's sequences
    shard: bool  # and its weights, gradients and averages
    sequences_per_step: int
    tokens_per_step: int
    epochs: float

    max_steps: int
    optimizer: str
    learning_rate: float
    min_lr: float
    warmup_steps: int
    lr_schedule: str
    decay_steps: int
    decay_fraction: float
    weight_decay: float
    beta1: float
    beta2: float
    grad_clip: float
    spike_sigma: float  # 0: spikes of the loss are not looked for

    eval_interval: int
    eval_windows: int
    eval_batch_size: int  # windows at a time
    patience: int
    save_interval: int
    save_minutes: float  # 0: by steps alone
    keep_last: int
    log_interval: int

    parameters: int
    checkpoint_bytes: int
    memory: dict[str, int]  # expected bytes by part, and how fast; estimated
    expected_tokens_per_sec: float
    speed_measured: bool  # here, by `gpt2box bench --sweep`
    peak_tflops: float  # of all cards, in `dtype`; 0 where that is not known
    log_format: str
    deterministic: bool  # the same bits each time, on the same kind of device
    wandb: str

    def mfu(self, tokens_per_sec: float) -> float | None:
        """Share of the card's peak that the model's own arithmetic comes to (Chowdhery et al. 2022, appendix B).

        None rather than a wrong one: where the peak is not known, or where gradients are not formed of all weights.
        """
        if not self.peak_tflops or self.lora_rank:
            return None
        return round(tokens_per_sec * self.shape.flops_per_token / (self.peak_tflops * 1e12), 4)


def in_this_way(plan: RunPlan, way: ExecutionPlan) -> RunPlan:
    """The same steps, done otherwise."""
    return replace(
        plan,
        micro_batch_size=way.micro_batch_size,
        grad_accum_steps=way.grad_accum_steps,
        activation_checkpointing=way.activation_checkpointing,
        eval_batch_size=evaluated_together(plan.shape, way, plan.device, plan.dtype, plan.loss_chunk_tokens),
        memory=way.memory.components(),
        expected_tokens_per_sec=way.tokens_per_sec,
        speed_measured=way.measured,
    )


def evaluated_together(shape: ModelShape, way: ExecutionPlan, device: str, dtype: str, loss_chunk_tokens: int) -> int:
    """Validation windows at a time: what fits where a micro-batch does; on a CPU more only falls out of the caches."""
    if device == "cpu":
        return way.micro_batch_size
    most = max(MAX_MICRO_BATCH_TOKENS // shape.block_size, 1)
    fits = max_evaluation_batch(shape, dtype, loss_chunk_tokens, way.memory.components())
    return max(min(fits, most), way.micro_batch_size)


def make_plan(
    config: Config,
    shape: ModelShape,
    train_tokens: int,
    device: str,
    dtype: str,
    compile_model: bool,
    option: ExecutionPlan,
    peak_tflops: float = 0.0,
) -> RunPlan:
    """The plan of a run on a device that has been looked at (see machine/device.py), in the way that was chosen."""
    on_cpu = device.partition(":")[0] == "cpu"
    sequences = config.tokens_per_step // config.block_size
    warmup = config.warmup_steps
    if warmup is None:
        warmup = min(2000, config.max_steps // 50)
    return RunPlan(
        shape=shape,
        dropout=config.dropout,
        seed=config.seed,
        device=device,
        dtype=dtype,
        compile=compile_model,
        activation_checkpointing=option.activation_checkpointing,
        loss_chunk_tokens=config.loss_chunk_tokens,
        weights_dtype=config.weights_dtype,
        optimizer_states=config.optimizer_states,
        optimizer_in_backward=config.optimizer_in_backward,
        lora_rank=config.lora_rank,
        lora_alpha=2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        micro_batch_size=option.micro_batch_size,
        grad_accum_steps=option.grad_accum_steps,
        ranks=option.ranks,
        shard=config.shard and option.ranks > 1,
        sequences_per_step=sequences,
        tokens_per_step=config.tokens_per_step,
        epochs=config.max_steps * config.tokens_per_step / max(train_tokens, 1),
        max_steps=config.max_steps,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        min_lr=config.learning_rate / 10 if config.min_lr is None else config.min_lr,
        warmup_steps=warmup,
        lr_schedule=config.lr_schedule,
        decay_steps=config.decay_steps or config.max_steps,
        decay_fraction=config.decay_fraction,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        grad_clip=config.grad_clip,
        spike_sigma=config.spike_sigma,
        eval_interval=config.eval_interval,
        eval_windows=config.eval_windows,
        eval_batch_size=evaluated_together(shape, option, device, dtype, config.loss_chunk_tokens),
        patience=config.patience,
        save_interval=config.save_interval or config.eval_interval,
        save_minutes=config.save_minutes,
        keep_last=config.keep_last,
        log_interval=config.log_interval,
        parameters=shape.parameters,
        checkpoint_bytes=shape.checkpoint_bytes(
            config.weights_dtype, config.optimizer, config.optimizer_states, config.lora_rank
        ),
        memory=option.memory.components(),
        expected_tokens_per_sec=option.tokens_per_sec,
        speed_measured=option.measured,
        peak_tflops=peak_tflops * option.ranks,
        log_format=config.log_format,
        deterministic=on_cpu if config.deterministic == "auto" else config.deterministic,
        wandb=config.wandb,
    )
