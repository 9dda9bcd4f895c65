"""The training loop: evaluation, checkpoints, steps, logging. Read `train` from the top."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import cast

import torch

from gpt2box.checkpoint.async_writer import AsyncCheckpointWriter, ShardContributor
from gpt2box.checkpoint.fingerprint import fingerprint_run_state
from gpt2box.distributed.consensus import Consensus
from gpt2box.distributed.group import NoOp
from gpt2box.runs.metrics import LogInterval, MetricsWriter, to_number
from gpt2box.system.device import peak_memory_bytes, translate_cuda_oom
from gpt2box.training.checkpoint_schedule import CheckpointSchedule
from gpt2box.training.console import Display
from gpt2box.training.evaluate import evaluate
from gpt2box.training.job import Job
from gpt2box.training.oom_fallback import agree_on_plan, record_plan, take_step
from gpt2box.training.step import StepExecutor, StepResult


def train(job: Job) -> None:
    """Train until max_steps, early stopping or a stop request; the last checkpoint holds the final state.

    Raises:
        TooManyBadSteps, UnfinishedStep: roll back to a checkpoint and call again (run.py does).
        torch.cuda.OutOfMemoryError: no execution plan is left that needs less; the steps so far are saved.
        TryAgain, VolumeUnwritable, Damaged: see join_rank_group, publish_checkpoint, TokenFile.read.
    """
    state, plan, consensus = job.state, job.plan, Consensus(job.stop, job.group)
    with open_training(job) as (display, metrics, steps, checkpoints):
        interval = LogInterval()
        while True:
            begun, improved = time.monotonic(), False
            checkpoints.writer.raise_if_failed()
            consensus.update(wants_save=checkpoints.is_overdue())
            if is_evaluation_due(job) and not consensus.should_stop:
                steps.check_bad_steps()
                with checkpoints.saving_on_oom():
                    improved = evaluate_and_record(job, metrics, display)
            is_last = consensus.should_stop or state.step >= plan.config.max_steps or state.stopped_early
            if checkpoints.is_due(improved, now=is_last or consensus.should_save):
                checkpoints.save()
            if is_last:
                consensus.wait()
                return checkpoints.writer.wait()
            interval.exclude_seconds(time.monotonic() - begun)

            result = take_step(job, steps, checkpoints, display)
            interval.add_step(result.loss)
            if state.step % plan.config.log_interval == 0 or state.step == plan.config.max_steps:
                log_train_row(job, metrics, display, interval, steps, result)


@contextmanager
def open_training(job: Job) -> Iterator[tuple[Display, MetricsWriter, StepExecutor, CheckpointSchedule]]:
    """Open what the loop writes to and steps with; close it in reverse order."""
    job.model.train()
    steps = StepExecutor(job.plan, job.model, job.optimizer, job.dataset, job.state, job.group, job.check_dataset)
    with ExitStack() as stack:
        display = stack.enter_context(closing(open_display(job)))
        metrics = stack.enter_context(closing(open_metrics(job, display)))
        writer = stack.enter_context(closing(open_checkpoint_writer(job, display)))
        stack.enter_context(closing(steps))
        agree_on_plan(job, steps, display)
        record_plan(job, display)
        yield display, metrics, steps, CheckpointSchedule(job, writer, steps)


def open_display(job: Job) -> Display:
    """Open the console of rank 0; the other ranks show nothing."""
    return Display(job.run.name, job.state.step, job.plan) if job.group.is_rank_0 else cast(Display, NoOp())


def open_metrics(job: Job, display: Display) -> MetricsWriter:
    """Open metrics.jsonl on rank 0; the other ranks write nothing."""
    if not job.group.is_rank_0:
        return cast(MetricsWriter, NoOp())
    state, echo = job.state, job.plan.config.log_format == "json"
    path = job.run / "metrics.jsonl"
    return MetricsWriter(path, state.step, state.evaluated_step, echo, job.plan.config.wandb, display.print_line)


def open_checkpoint_writer(job: Job, display: Display) -> AsyncCheckpointWriter:
    """Open the checkpoint writer of rank 0. With `shard` the other ranks contribute their rows."""
    if not job.group.is_rank_0:
        other = ShardContributor(job.model, job.optimizer) if job.plan.derived.shard else NoOp()
        return cast(AsyncCheckpointWriter, other)
    writer = AsyncCheckpointWriter(
        job.run / "checkpoints",
        job.model,
        job.optimizer,
        job.tokenizer,
        job.plan,
        display.print_line,
        job.lock_mark,
        job.staging_buffer,
    )
    job.staging_buffer = writer.staging_buffer
    return writer


def is_evaluation_due(job: Job) -> bool:
    """Return whether to evaluate: at every eval_interval and at the end, once a step."""
    state, config = job.state, job.plan.config
    at_interval = state.step % config.eval_interval == 0 or state.step >= config.max_steps
    return at_interval and state.evaluated_step != state.step


def evaluate_and_record(job: Job, metrics: MetricsWriter, display: Display) -> bool:
    """Evaluate, update the state's best, write metrics and a sample; return whether the loss is the best so far."""
    state, plan = job.state, job.plan
    job.check_dataset()
    val_loss, val_set = evaluate(job.model, job.dataset, plan, job.group)
    improved = math.isfinite(val_loss) and (state.best_val_loss is None or val_loss < state.best_val_loss)
    state.evaluated_step, state.val_loss = state.step, val_loss
    if improved:
        state.best_val_loss, state.best_step, state.evaluations_without_best = val_loss, state.step, 0
    else:
        state.evaluations_without_best += 1
        state.stopped_early = 0 < plan.config.patience <= state.evaluations_without_best
    metrics.write(state.step, "eval", val_loss=to_number(val_loss), val_set=val_set, best=improved)
    display.show_evaluation(state.step, val_loss, improved, state.best_val_loss, state.best_step)
    if math.isfinite(val_loss):
        try:
            with translate_cuda_oom():
                job.sample(display, state.step)
        except torch.cuda.OutOfMemoryError:
            display.print_line("no sample this time: out of memory")
    return improved


def log_train_row(
    job: Job,
    metrics: MetricsWriter,
    display: Display,
    interval: LogInterval,
    steps: StepExecutor,
    result: StepResult,
) -> None:
    """Write the interval's figures. Only here the loop waits for the device."""
    plan, state = job.plan, job.state
    loss, count, seconds = interval.finish()
    steps.check_bad_steps()
    bad_steps = steps.optimizer_step.bad_steps
    state.seconds += seconds
    tokens_per_sec = count * plan.config.tokens_per_step / max(seconds, 1e-9)
    row = {
        "loss": to_number(loss),
        "learning_rate": result.learning_rate,
        "grad_norm": to_number(float(result.grad_norm)),
        "tokens_per_sec": round(tokens_per_sec, 1),
        "peak_memory_bytes": peak_memory_bytes(torch.device(plan.derived.device)),
        "skipped_steps": int(bad_steps.total),
        "loss_spikes": int(bad_steps.spikes),
        "mfu": plan.mfu(tokens_per_sec),
        "digest": fingerprint_run_state(job.model, job.optimizer),
    }
    metrics.write(state.step, "train", **row)
    display.show_train_row(state.step, row, (plan.config.max_steps - state.step) * interval.mean_step_seconds())
