"""What a run logs before it trains and when it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gpt2box.checkpoint import retention
from gpt2box.checkpoint.loader import load_weights
from gpt2box.checkpoint.metadata import TrainState
from gpt2box.config.schema import Config
from gpt2box.evaluation.memorization import measure_memorization, read_memorization, show_before_and_after
from gpt2box.planner.run_plan import RunPlan
from gpt2box.report.loss_plot import plot_loss
from gpt2box.report.page import published_val_loss, write_report
from gpt2box.training.job import Job
from gpt2box.utils.paths import display_path, in_image
from gpt2box.utils.progress import format_bytes, format_duration, gpt2box_command, log_line, pluralize
from gpt2box.utils.signals import StopRequest


def describe_plan(config: Config, plan: RunPlan, device: str) -> None:
    """Log what the run is about to do."""
    shape, execution, derived = plan.shape, plan.execution, plan.derived
    shared_by = f" × {execution.ranks} ranks" if execution.ranks > 1 else ""
    log_line(
        f"{config.name}: {shape.n_layer} layers × {shape.n_embd} wide, {shape.n_head} heads, "
        f"{plan.shape.parameters:,} parameters, from {config.init_from}, on {config.dataset}"
    )
    log_line(
        f"  {config.tokens_per_step:,} tokens a step = {execution.micro_batch_size} × {shape.block_size} × "
        f"{pluralize(execution.grad_accum_steps, 'micro-step')}{shared_by}; "
        f"{config.max_steps:,} steps = {derived.epochs:.2g} passes over the text"
    )
    if config.lora_rank:
        trained = shape.adapter_parameters(config.lora_rank)
        log_line(
            f"  trained are adapters of rank {config.lora_rank}, {trained:,} parameters; the weights stay as they are"
        )
    compiled = "compiled" if execution.compile else "not compiled"
    mode = execution.activation_checkpointing
    checkpointing = "" if mode == "none" else f", {mode} activation checkpointing"
    log_line(
        f"  {device}; {derived.dtype}, {compiled}{checkpointing}; "
        f"a checkpoint is {format_bytes(derived.checkpoint_bytes)}"
    )
    pace = execution.tokens_per_sec
    seconds = config.max_steps * config.tokens_per_step / pace if pace else 0
    speed = f"{pace:,.0f} tokens/s, {format_duration(seconds)} to the end" if pace else ""
    if derived.shard:
        log_line("  each rank keeps a share of weights, gradients and optimizer state; no samples while training")
    if derived.device != "cpu":
        estimated = "" if execution.measured or not speed else f"; {speed}"
        log_line(
            f"  estimated: {format_bytes(sum(execution.memory.components().values()))} of the GPU's memory{estimated}"
        )
    if execution.measured:
        log_line(f"  measured here (gpt2box bench): {speed}")


def study_samples(job: Job) -> None:
    """Compare the samples before and after training, and measure how much of the text was memorized.

    Uses the weights that `gpt2box sample` loads.
    """
    config = job.plan.config
    step = best_or_last_step(job.run, job.state)
    load_weights(job.run / "checkpoints" / retention.checkpoint_name(step), job.model)
    if job.started_from_weights and (columns := show_before_and_after(job.run, step)):
        log_line(columns)
    prompt, length = config.sample_prompt, config.sample_tokens
    try:
        measure_memorization(job.run, job.model, job.dataset, prompt, length, config.seed, step)
    except torch.cuda.OutOfMemoryError:
        log_line("note: not looked for what it knows by heart: out of memory")


def best_or_last_step(run: Path, state: TrainState) -> int:
    """Return the step of the best checkpoint, or of the last if none improved on the start."""
    return state.best_step if (run / "checkpoints" / "best").exists() else state.step


def summarize(
    config: Config, argument: str | None, run: Path, state: TrainState, stop: StopRequest, plan: RunPlan, trained: bool
) -> None:
    """Log how the run ended, where its files are, and the next command."""
    ended = "stopped early, no better val_loss" if state.stopped_early else "finished"
    if not trained and not stop and (run / "report.html").exists():
        more = ["--patience", f"{2 * config.patience}"] if state.stopped_early else ["--max-steps", f"{2 * state.step}"]
        log_line(f"{config.name}: {ended} at step {state.step:,} before; nothing is left to do")
        log_line(f"  to train longer {resume_command(argument, plan, *more)}")
        return
    picture = plot_loss(run)
    if stop:
        retention = "saved" if (run / "checkpoints" / "last").exists() else "with nothing to save yet"
        log_line(f"stopped by {stop.name} at step {state.step:,} of {plan.config.max_steps:,}, {retention}")
        log_line(f"  to go on        {resume_command(argument, plan)}")
        return
    pace = plan.execution.tokens_per_sec
    kind = "as measured before" if plan.execution.measured else "estimated"
    estimate = f" ({kind}: {format_duration(state.step * plan.config.tokens_per_step / pace)})" if pace else ""
    log_line(
        f"{config.name}: {ended} at step {state.step:,} after {format_duration(state.seconds)} of training{estimate}"
    )
    if state.best_val_loss is not None:
        expected = published_val_loss(config.model_dump())
        of_others = "" if expected is None else f" (published for this config: {expected:g})"
        log_line(f"  best val_loss   {state.best_val_loss:.4f} at step {state.best_step:,}{of_others}")
    if memorization := read_memorization(run, best_or_last_step(run, state)):
        log_line(f"  memorized       {memorization.describe()}")
    log_line(f"  loss curve      {display_path(picture)}")
    log_line(f"  report          {display_path(write_report(run))} (opens in a browser)")
    best = run / "checkpoints" / "best"
    model = best if best.exists() else run / "checkpoints" / "last"
    if model.exists():
        log_line(f"  model           {display_path(model)} (a Hugging Face folder)")
    log_line(f"  everything      {display_path(run)}")
    if model.exists():
        log_line(f"  next            {'make sample' if in_image() else gpt2box_command('sample', config.name)}")


def resume_command(argument: str | None, plan: RunPlan, *more: str) -> str:
    """Return the same command with more options, to paste; in words if a container or torchrun started it."""
    if in_image() or plan.execution.ranks > 1:
        return " ".join(["the same command again", *(["with"] if more else []), *more])
    words = sys.argv[1:] if sys.argv[1:2] == ["train"] else ["train", *([argument] if argument else [])]
    return f"{'' if more else 'the same command again: '}{gpt2box_command(*words, *more)}"
