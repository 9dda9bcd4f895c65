"""The training loop: batches, accumulation, step, evaluation, checkpoints. Read `train` from the top."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt2box.data.batches import TrainWindows, micro_batches, read_windows, val_window_starts
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.data.tokens import Dataset, TokenFile
from gpt2box.errors import BadInput
from gpt2box.machine.device import peak_memory_bytes
from gpt2box.model.gpt2 import GPT2
from gpt2box.planning.plan import RunPlan
from gpt2box.stop import StopRequest
from gpt2box.training import checkpoint
from gpt2box.training.checkpoint import TrainState
from gpt2box.training.metrics import Display, Metrics
from gpt2box.training.optim import GuardedStep, learning_rate

MOST_BAD_STEPS = 5  # non-finite steps in a row after which a run stops


@dataclass
class Job:
    """What the loop works on."""

    run: Path
    plan: RunPlan
    model: GPT2
    optimizer: torch.optim.AdamW
    dataset: Dataset
    tokenizer: Tokenizer
    state: TrainState
    stop: StopRequest
    sample: Callable[[Display, int], None]  # called after each evaluation
    pretrained: bool  # the weights before the first step are worth keeping


def train(job: Job) -> None:
    """Train until max_steps, a lack of progress, or a request to stop; the last checkpoint holds the end.

    Raises:
        BadInput: losses or gradients were not finite several steps in a row.
        VolumeUnwritable, Damaged: see checkpoint.save, TokenFile.read.
    """
    plan, state, device = job.plan, job.state, torch.device(job.plan.device)
    windows = TrainWindows(job.dataset.tokens("train"), plan.shape.block_size, plan.seed)
    batches = micro_batches(
        job.dataset.folder / "train.bin",
        windows,
        plan.shape.vocab_size,
        first_sequence=state.step * plan.sequences_per_step,
        micro_batch_size=plan.micro_batch_size,
        pin=device.type == "cuda",
    )
    forward = torch.compile(job.model) if plan.compile else job.model
    guarded_step = GuardedStep(job.optimizer, plan.grad_clip, device)
    metrics = Metrics(job.run / "metrics.jsonl", state.step, state.evaluated_step)
    display = Display(state.step, plan.max_steps)
    interval = Interval(device)
    saved_step = state.step
    job.model.train()
    with closing(batches), closing(metrics), closing(display):
        while True:
            begun = time.monotonic()
            improved = False
            if evaluation_due(job) and not job.stop:
                check_finite(job, guarded_step)
                improved = evaluate_and_note(job, metrics, display)
            over = bool(job.stop) or state.step >= plan.max_steps or state.stopped_early
            new = state.step != saved_step and (over or state.step % plan.save_interval == 0)
            if new or (improved and (state.step > 0 or job.pretrained)):
                check_finite(job, guarded_step)
                checkpoint.save(job.run / "checkpoints", job.model, job.optimizer, state, job.tokenizer)
                checkpoint.prune(job.run / "checkpoints", plan.keep_last, state)
                saved_step = state.step
            if over:
                break
            interval.leave_out(time.monotonic() - begun)

            if plan.dropout:
                torch.manual_seed(plan.seed + state.step)  # so that resuming needs no generator's state
            loss = torch.zeros((), device=device)
            for _ in range(plan.grad_accum_steps):
                batch = next(batches).to(device, non_blocking=True)  # (B, T + 1)
                with autocast(plan):
                    micro_loss = forward(batch[:, :-1], batch[:, 1:], 1.0 / plan.grad_accum_steps)
                micro_loss.backward()
                loss += micro_loss.detach()
            lr = learning_rate(state.step, plan)
            grad_norm = guarded_step(lr, loss)
            state.step += 1
            interval.add(loss)

            if state.step % plan.log_interval == 0 or state.step == plan.max_steps:
                log(job, metrics, display, interval, guarded_step, lr, grad_norm)


def autocast(plan: RunPlan) -> AbstractContextManager[object]:
    """bfloat16 products where the plan says so; weights stay float32."""
    wanted = plan.dtype == "bfloat16"
    return torch.autocast(torch.device(plan.device).type, torch.bfloat16, enabled=wanted)


class Interval:
    """Steps, loss and time since the last log line, with evaluation and saving left out of the time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loss = torch.zeros((), device=device)
        self._steps = 0
        self._begun = time.monotonic()

    def add(self, loss: Tensor) -> None:
        self._loss = self._loss + loss
        self._steps += 1

    def leave_out(self, seconds: float) -> None:
        self._begun += seconds

    def take(self) -> tuple[float, int, float]:
        """Mean loss, steps and seconds; begins anew. Waits for the device."""
        steps = self._steps
        loss = float(self._loss) / max(steps, 1)
        seconds = time.monotonic() - self._begun
        self._loss, self._steps, self._begun = torch.zeros((), device=self._device), 0, time.monotonic()
        return loss, steps, seconds


def log(
    job: Job,
    metrics: Metrics,
    display: Display,
    interval: Interval,
    guarded_step: GuardedStep,
    lr: float,
    grad_norm: Tensor,
) -> None:
    """Note the interval's figures; here, and only here, the loop waits for the device."""
    plan, state = job.plan, job.state
    loss, steps, seconds = interval.take()
    check_finite(job, guarded_step)
    state.seconds += seconds
    tokens_per_sec = steps * plan.tokens_per_step / max(seconds, 1e-9)
    memory = peak_memory_bytes(torch.device(plan.device))
    skipped = int(guarded_step.skipped)
    metrics.write(
        state.step,
        "train",
        loss=finite_or_none(loss),
        learning_rate=lr,
        grad_norm=finite_or_none(float(grad_norm)),
        tokens_per_sec=round(tokens_per_sec, 1),
        peak_memory_bytes=memory,
        skipped_steps=skipped,
    )
    left = (plan.max_steps - state.step) * plan.tokens_per_step / tokens_per_sec
    display.train(state.step, loss, tokens_per_sec, left, memory)


def finite_or_none(value: float) -> float | None:
    """NaN and infinity are not JSON."""
    return value if math.isfinite(value) else None


def check_finite(job: Job, guarded_step: GuardedStep) -> None:
    """Count the steps that reached the weights; stop a run whose losses are no longer finite.

    Raises:
        BadInput: MOST_BAD_STEPS in a row were not. The weights are as before the first of them.
    """
    state = job.state
    state.optimizer_steps = optimizer_steps(job.optimizer)
    in_a_row = int(guarded_step.skipped_in_a_row)
    if in_a_row >= MOST_BAD_STEPS:
        last = job.run / "checkpoints" / "last"
        raise BadInput(
            f"step {state.step}: loss or gradient not finite, {in_a_row} steps in a row (none reached the weights)",
            "finite numbers; a too high learning rate or damaged weights are the usual cause",
            f"try --learning-rate {job.plan.learning_rate / 2:g} or --dtype float32 under another --name"
            + (f"; the last good checkpoint is {last.resolve()}" if last.exists() else ""),
        )


def optimizer_steps(optimizer: torch.optim.AdamW) -> int:
    """Steps that AdamW has counted, which leaves out non-finite ones."""
    return max((int(entry["step"]) for entry in list(optimizer.state.values())[:1]), default=0)


def evaluation_due(job: Job) -> bool:
    """At every eval_interval, and at the end; once a step."""
    state, plan = job.state, job.plan
    at_interval = state.step % plan.eval_interval == 0 or state.step >= plan.max_steps
    return at_interval and state.evaluated_step != state.step


def evaluate_and_note(job: Job, metrics: Metrics, display: Display) -> bool:
    """Evaluate, update the state's best, write metrics and a sample; returns whether it is the best so far."""
    state, plan = job.state, job.plan
    val_loss, val_set = evaluate(job.model, job.dataset, plan)
    improved = math.isfinite(val_loss) and (state.best_val_loss is None or val_loss < state.best_val_loss)
    state.evaluated_step, state.val_loss = state.step, val_loss
    if improved:
        state.best_val_loss, state.best_step, state.evaluations_without_best = val_loss, state.step, 0
    else:
        state.evaluations_without_best += 1
        state.stopped_early = 0 < plan.patience <= state.evaluations_without_best
    metrics.write(state.step, "eval", val_loss=finite_or_none(val_loss), val_set=val_set, best=improved)
    display.line(f"step {state.step:,}/{plan.max_steps:,}  val_loss {val_loss:.4f}{'  best' if improved else ''}")
    if math.isfinite(val_loss):
        job.sample(display, state.step)
    return improved


@torch.no_grad()
def evaluate(model: GPT2, dataset: Dataset, plan: RunPlan) -> tuple[float, str]:
    """Mean loss over the fixed validation windows, and that set's name."""
    starts = val_window_starts(dataset.tokens("val"), plan.shape.block_size, plan.eval_windows)
    total = torch.zeros((), device=plan.device)
    was_training = model.training
    model.eval()
    with closing(TokenFile(dataset.folder / "val.bin")) as file, autocast(plan):
        for begin in range(0, len(starts), plan.micro_batch_size):
            chosen = [int(start) for start in starts[begin : begin + plan.micro_batch_size]]
            batch = read_windows(file, chosen, plan.shape.block_size, plan.shape.vocab_size).to(plan.device)
            total += model(batch[:, :-1], batch[:, 1:]) * len(chosen)
    model.train(was_training)
    return float(total) / len(starts), f"{dataset.digest}/{len(starts)}x{plan.shape.block_size}"
