"""The training loop: batches, accumulation, step, evaluation, checkpoints. Read `train` from the top."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gpt2box.checkpoint.async_writer import AsyncCheckpointWriter, ShardContributor, StagingBuffer
from gpt2box.checkpoint.fingerprint import fingerprint_run_state
from gpt2box.checkpoint.metadata import TrainState
from gpt2box.checkpoint.writer import save_checkpoint
from gpt2box.data.dataloader import TrainWindows, copy_to_device, count_loss_targets, inputs_and_targets, micro_batches
from gpt2box.data.dataset import Dataset
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.distributed.consensus import Consensus
from gpt2box.distributed.group import NoOp, RankGroup
from gpt2box.errors import Gpt2boxError
from gpt2box.model.gpt2 import GPT2
from gpt2box.optim.clipped_step import ClippedStep, make_optimizer_step
from gpt2box.optim.factory import Optimizer
from gpt2box.optim.in_backward import InBackwardStep
from gpt2box.optim.loss_spikes import BadStepCounter
from gpt2box.optim.low_memory_adamw import LowMemoryAdamW
from gpt2box.optim.schedule import learning_rate_at
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.run_plan import RunPlan
from gpt2box.runs.metrics import LogInterval, MetricsWriter, to_number
from gpt2box.system.device import peak_memory_bytes, translate_cuda_oom
from gpt2box.training.console import Display
from gpt2box.training.evaluate import autocast, evaluate
from gpt2box.training.model_setup import through_compiler
from gpt2box.training.oom_fallback import note_way, rehearse, step_down, step_up
from gpt2box.training.rollback import HalfDoneStep, TooManyBad
from gpt2box.utils.signals import StopRequest

Update = ClippedStep | InBackwardStep


@dataclass
class Job:
    """What the loop works on."""

    run: Path
    plan: RunPlan
    model: GPT2
    optimizer: Optimizer
    dataset: Dataset
    tokenizer: Tokenizer
    state: TrainState
    stop: StopRequest
    sample: Callable[[Display, int], None]  # called after each evaluation
    pretrained: bool  # the weights before the first step are worth keeping
    group: RankGroup  # of the ranks that do each step together
    ways: list[ExecutionPlan]  # to do the same steps, fastest first: where to turn when memory runs out
    left: list[ExecutionPlan] = field(default_factory=list)  # the ways that were given up, the first at the beginning
    retry_steps: int = 0  # until the way before is tried again
    retry_at: int = 0
    mark: str = ""  # of the run's lock (files.check_mark), where it has one
    check_dataset: Callable[[], None] = lambda: None  # whether it is still what the run began with
    snapshot: StagingBuffer | None = None  # room for a checkpoint's copy, kept over returns to one


def train(job: Job) -> None:
    """Train until max_steps, a lack of progress, or a request to stop; the last checkpoint holds the end.

    Where memory runs out, the step is done again in a way that takes less, with the same tokens.

    Raises:
        TooManyBad: losses or gradients were not finite, or losses far above those before, several steps in a row.
        torch.cuda.OutOfMemoryError: no way is left that takes less; the steps so far are saved.
        HalfDoneStep: see there; the plan has stepped down.
        TryAgain: another rank is lost, see join_rank_group.
        VolumeUnwritable, Damaged: see publish_checkpoint, TokenFile.read.
    """
    state, consensus = job.state, Consensus(job.stop, job.group)
    job.model.train()
    compiled = job.plan.execution.compile and not job.plan.derived.shard  # else its blocks are, each by itself
    forward = job.group.wrap_ddp(job.model, through_compiler(job.model) if compiled else job.model)
    # LowMemoryAdamW's step may break off half-way: then one must be there to go back to (several ranks end).
    saved_step = (
        -1
        if isinstance(job.optimizer, LowMemoryAdamW) and job.group.is_single_process and state.step == 0
        else state.step
    )
    saved_at = time.monotonic()
    with ExitStack() as stack:
        display = stack.enter_context(closing(open_display(job)))
        metrics = stack.enter_context(closing(open_metrics(job, display)))
        saver = stack.enter_context(closing(open_saver(job, display)))
        rehearse(job, forward, display)
        note_way(job, display)
        plan = job.plan
        batches = open_batches(job)
        update = make_optimizer_step(
            job.optimizer, plan, BadStepCounter.from_plan(plan, state.bad_steps, state.recent_losses)
        )
        interval = LogInterval()
        stack.callback(lambda: batches.close())
        stack.callback(lambda: update.close())

        def save() -> None:
            nonlocal saved_step, saved_at
            check_bad_steps(job, update)
            saver.save(state)
            saved_step, saved_at = state.step, time.monotonic()

        while True:
            begun = time.monotonic()
            saver.raise_if_failed()
            improved = False
            consensus.update(wants_save=0 < job.plan.config.save_minutes * 60 <= begun - saved_at)
            if evaluation_due(job) and not consensus.should_stop:
                check_bad_steps(job, update)
                try:
                    improved = evaluate_and_note(job, metrics, display)
                except torch.cuda.OutOfMemoryError:
                    if state.step != saved_step:
                        save_in_need(job, saver)
                    raise
            over = consensus.should_stop or state.step >= plan.config.max_steps or state.stopped_early
            new = state.step != saved_step and (
                over or consensus.should_save or state.step % plan.derived.save_interval == 0
            )
            if new or (improved and (state.step > 0 or job.pretrained)):
                save()
            if over:
                consensus.wait()
                saver.wait()
                break
            interval.exclude_seconds(time.monotonic() - begun)

            done = None
            with suppress(torch.cuda.OutOfMemoryError):  # while it is handled, it holds on to the step's tensors
                done = take_step(job, forward, batches, update)
            if done is None:
                half_done = getattr(job.optimizer, "is_step_unfinished", False)
                if state.step != saved_step and not half_done:
                    with suppress(
                        *([] if job.group.is_single_process else [TooManyBad])
                    ):  # of which the others do not hear
                        check_bad_steps(job, update)
                    save_in_need(job, saver)
                    saved_step = state.step
                step_down(job, display)
                if half_done:
                    raise HalfDoneStep
            else:
                loss, lr, grad_norm = done
                state.step += 1
                interval.add_step(loss)
            if done is not None and job.left and state.step >= job.retry_at:
                if isinstance(job.optimizer, LowMemoryAdamW) and state.step != saved_step:
                    save()  # if it fails half-way, back to here
                step_up(job, display)
            if plan is not job.plan:
                plan = job.plan
                note_way(job, display)
                update.close()
                update = make_optimizer_step(job.optimizer, plan, update.bad_steps)
                batches.close()
                batches = open_batches(job)
            if done is None:
                continue

            if state.step % plan.config.log_interval == 0 or state.step == plan.config.max_steps:
                log(job, metrics, display, interval, update, lr, grad_norm)


def open_saver(job: Job, display: Display) -> AsyncCheckpointWriter:
    """What writes checkpoints; of other ranks than the first, nothing, or what hands it their rows."""
    if not job.group.is_rank_0:
        return cast(
            AsyncCheckpointWriter, ShardContributor(job.model, job.optimizer) if job.plan.derived.shard else NoOp()
        )
    folder = job.run / "checkpoints"
    saver = AsyncCheckpointWriter(
        folder, job.model, job.optimizer, job.tokenizer, job.plan, display.print_line, job.mark, job.snapshot
    )
    job.snapshot = saver.staging_buffer
    return saver


def save_in_need(job: Job, saver: AsyncCheckpointWriter) -> None:
    """Save where memory has run out: also another rank than the first, if it sees the run's folder.

    All ranks have the same weights, and the first waits for this one in the midst of a step. Where they are split,
    nobody has all of them.
    """
    if job.plan.derived.shard:
        return
    if not job.group.is_rank_0 and (job.run / "plan.json").exists():
        with suppress(Gpt2boxError):  # what ends the run is that memory ran out
            save_checkpoint(job.run / "checkpoints", job.model, job.optimizer, job.state, job.tokenizer)
    saver.save(job.state)


def open_batches(job: Job) -> Generator[Tensor, None, None]:
    """The micro-batches from the present step on."""
    job.check_dataset()
    plan = job.plan
    windows = TrainWindows(job.dataset.tokens("train"), plan.shape.block_size, plan.config.seed)
    return micro_batches(
        job.dataset.folder / "train.bin",
        windows,
        plan.shape.vocab_size,
        first_sequence=job.state.data_step * plan.sequences_per_step
        + job.group.ranks.rank * plan.execution.micro_batch_size,
        micro_batch_size=plan.execution.micro_batch_size,
        pin=torch.device(plan.derived.device).type == "cuda",
        ranks=plan.execution.ranks,
    )


def open_display(job: Job) -> Display:
    """Where the run's progress is shown; that of other ranks than the first, nowhere."""
    return Display(job.run.name, job.state.step, job.plan) if job.group.is_rank_0 else cast(Display, NoOp())


def open_metrics(job: Job, display: Display) -> MetricsWriter:
    """Where the run's figures go."""
    if not job.group.is_rank_0:
        return cast(MetricsWriter, NoOp())
    state, echo = job.state, job.plan.config.log_format == "json"
    path = job.run / "metrics.jsonl"
    return MetricsWriter(path, state.step, state.evaluated_step, echo, job.plan.config.wandb, display.print_line)


@translate_cuda_oom()
def take_step(job: Job, forward: Any, batches: Iterator[Tensor], update: Update) -> tuple[Tensor, float, Tensor]:
    """One optimizer step; returns its loss, learning rate and gradient norm.

    PyTorch's AdamW changes the weights at the end only; LowMemoryAdamW may stop half-way (`is_step_unfinished`).
    """
    plan, device = job.plan, torch.device(job.plan.derived.device)
    if plan.config.dropout:
        # So that resuming needs no generator's state. Each rank drops others.
        torch.manual_seed(plan.config.seed + job.state.step + (job.group.ranks.rank << 40))
    loss = torch.zeros((), device=device)
    lr = learning_rate_at(job.state.step, plan)
    of_step: Iterable[Tensor] = (next(batches) for _ in range(plan.execution.grad_accum_steps))
    shares = None
    if job.dataset.masked:
        of_step = list(of_step)
        shares = target_shares(of_step, job.group)
    for micro_step, batch in enumerate(of_step):
        inputs, targets = inputs_and_targets(copy_to_device(batch, device))  # (B, T)
        with job.group.gradient_sync(forward, is_last=micro_step == plan.execution.grad_accum_steps - 1):
            with autocast(plan):
                micro_loss = forward(inputs, targets, 1.0 / plan.execution.grad_accum_steps)
            update.before_backward(job.state.step, micro_step, lr, micro_loss)  # a mean as other steps', not weighted
            if shares is not None:
                micro_loss = micro_loss * shares[micro_step]
            micro_loss.backward()
        loss += micro_loss.detach()
    loss = job.group.all_reduce_mean(loss)
    return loss, lr, update(loss)


def target_shares(of_step: list[Tensor], group: RankGroup) -> list[float]:
    """What makes a mean over all targets of a step that count, of the micro-batches' own means on all ranks."""
    counts = [count_loss_targets(batch) for batch in of_step]
    (all_counts,) = group.all_reduce_sum(sum(counts))
    return [count * len(counts) * group.ranks.world_size / max(all_counts, 1) for count in counts]


def log(
    job: Job,
    metrics: MetricsWriter,
    display: Display,
    interval: LogInterval,
    update: Update,
    lr: float,
    grad_norm: Tensor,
) -> None:
    """Note the interval's figures; here, and only here, the loop waits for the device."""
    plan, state = job.plan, job.state
    loss, steps, seconds = interval.finish()
    check_bad_steps(job, update)
    state.seconds += seconds
    tokens_per_sec = steps * plan.config.tokens_per_step / max(seconds, 1e-9)
    row = {
        "loss": to_number(loss),
        "learning_rate": lr,
        "grad_norm": to_number(float(grad_norm)),
        "tokens_per_sec": round(tokens_per_sec, 1),
        "peak_memory_bytes": peak_memory_bytes(torch.device(plan.derived.device)),
        "skipped_steps": int(update.bad_steps.total),
        "loss_spikes": int(update.bad_steps.spikes),
        "mfu": plan.mfu(tokens_per_sec),
        "digest": fingerprint_run_state(job.model, job.optimizer),
    }
    metrics.write(state.step, "train", **row)
    display.show_train_row(state.step, row, (plan.config.max_steps - state.step) * interval.mean_step_seconds())


def check_bad_steps(job: Job, update: Update) -> None:
    """Count the steps that reached the weights; stop where too many did not.

    Looked at before each save and evaluation, so what is found does not depend on when one looks.

    Raises:
        TooManyBad: too many in a row were bad (loss_spikes.py).
    """
    state = job.state
    state.optimizer_steps = optimizer_steps(job.optimizer)
    bad_steps = update.bad_steps
    state.bad_steps, state.recent_losses = int(bad_steps.consecutive), bad_steps.recent_losses
    if since := bad_steps.steps_since_too_many:
        raise TooManyBad(state.step - since + 1, update.skip_note, int(bad_steps.consecutive_spikes))


def optimizer_steps(optimizer: Optimizer) -> int:
    """Steps that AdamW has counted, which leaves out bad ones."""
    return max((int(entry["step"]) for entry in list(optimizer.state.values())[:1]), default=0)


def evaluation_due(job: Job) -> bool:
    """At every eval_interval, and at the end; once a step."""
    state, plan = job.state, job.plan
    at_interval = state.step % plan.config.eval_interval == 0 or state.step >= plan.config.max_steps
    return at_interval and state.evaluated_step != state.step


def evaluate_and_note(job: Job, metrics: MetricsWriter, display: Display) -> bool:
    """Evaluate, update the state's best, write metrics and a sample; returns whether it is the best so far."""
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
