"""A training job from settings to summary: what `gpt2box train` does, in order. Read `run` from the top."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2box.checkpoint.loader import restore_checkpoint
from gpt2box.checkpoint.metadata import TrainState
from gpt2box.config import loader
from gpt2box.config.schema import Config
from gpt2box.distributed.group import NoOp, RankGroup, join_rank_group
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import load_hf_weights
from gpt2box.optim.factory import Optimizer, make_optimizer
from gpt2box.runs.manifest import parse_allowed_changes, warn_if_not_bit_exact, write_run_records
from gpt2box.runs.sessions import make_session
from gpt2box.system.device import translate_cuda_oom
from gpt2box.system.provenance import collect_provenance
from gpt2box.training.evaluate import evaluate
from gpt2box.training.job import Job
from gpt2box.training.model_setup import init_on_all_ranks, init_weights, make_empty_model
from gpt2box.training.resolve import ResolvedRun, list_fallback_plans, resolve
from gpt2box.training.resume import acquire_run_lock, find_resume_point, make_dataset_check, verify_restored_state
from gpt2box.training.rollback import (
    TooManyBadSteps,
    UnfinishedStep,
    machine_error,
    out_of_memory_error,
    reporting_oom,
    restore_last_checkpoint,
    roll_back,
)
from gpt2box.training.samples import Sampler
from gpt2box.training.summary import describe_plan, study_samples, summarize
from gpt2box.training.trainer import train
from gpt2box.utils.paths import run_dir, text_path
from gpt2box.utils.progress import run_log_file
from gpt2box.utils.ranks import SINGLE_PROCESS
from gpt2box.utils.signals import StopRequest


def run_job(argument: str | None, flags: dict[str, Any], stop: StopRequest, allow: Sequence[str] = ()) -> None:
    """Start or resume a run; report if it has already finished.

    `argument`: a preset, a YAML or nanoGPT file. `allow`: settings that may differ from the original run.

    Raises:
        Gpt2boxError: see errors.py; nothing is written before settings, dataset and device are checked.
    """
    allowed = parse_allowed_changes(allow)
    with join_rank_group() as group:
        config, notes = group.run_on_rank0(lambda: loader.load_config(argument, flags))
        text = text_path(str(flags.get("dataset") or ""))
        resolved = resolve(config, group, text, notes)
        run(resolved, group, stop, argument, allowed)


def run_config(config: Config, argument: str, stop: StopRequest) -> None:
    """Start or resume a run of a loaded Config whose dataset exists."""
    with join_rank_group() as group:
        run(resolve(config, group), group, stop, argument)


def run(
    resolved: ResolvedRun, group: RankGroup, stop: StopRequest, argument: str | None, allow: Sequence[str] = ()
) -> None:
    """Open the run folder, resume or initialise, train, and summarise. With `eval_only`, evaluate instead."""
    if resolved.config.eval_only:
        return evaluate_only(resolved, group)
    with ExitStack() as stack:
        start = open_run_folder(resolved, group, allow, stack)
        state = start.state
        if start.has_work:
            job = make_job(resolved, start, stop, group)
            train_with_rollback(job)
            state = job.state
            if resolved.config.sample_tokens and not stop and group.is_rank_0 and not resolved.plan.derived.shard:
                study_samples(job)
    if group.is_rank_0:
        with run_log_file(start.folder / "log.txt"):
            summarize(resolved.config, argument, start.folder, state, stop, resolved.plan, trained=start.has_work)


@dataclass
class RunStart:
    """The state that a run starts or resumes from."""

    folder: Path
    lock_mark: str
    checkpoint: Path | None  # None: a new run
    state: TrainState
    changed: dict[str, Any]  # settings that differ from the last session, with their old values
    has_work: bool  # steps or an evaluation are left


def open_run_folder(resolved: ResolvedRun, group: RankGroup, allow: Sequence[str], stack: ExitStack) -> RunStart:
    """Lock the run folder until `stack` closes, and find the checkpoint to resume from.

    Raises:
        BadInput: settings differ from the original run's.
        Damaged: the dataset or the checkpoints are not the run's.
    """
    config, plan, folder = resolved.config, resolved.plan, run_dir(resolved.config.name)
    lock_mark = group.run_on_rank0(lambda: acquire_run_lock(config, folder, stack))
    describe_plan(config, plan, resolved.target.name)
    found, changed = group.run_on_rank0(lambda: find_resume_point(config, resolved.dataset, folder, allow))
    state = found[1] if found else TrainState()
    if state.stopped_early and (config.patience == 0 or state.evaluations_without_best < config.patience):
        state.stopped_early = False  # the patience was raised
    stopped_before_evaluation = state.step == config.max_steps != state.evaluated_step
    has_work = (state.step < config.max_steps or stopped_before_evaluation) and not state.stopped_early
    return RunStart(folder, lock_mark, found[0] if found else None, state, changed, has_work)


def make_job(resolved: ResolvedRun, start: RunStart, stop: StopRequest, group: RankGroup) -> Job:
    """Build the model and the optimizer, load or initialise them on all ranks, and write the run's records."""
    config, plan, dataset, state = resolved.config, resolved.plan, resolved.dataset, start.state

    def load_values(model: GPT2, optimizer: Optimizer) -> None:
        if not start.checkpoint or config.lora_rank:
            init_weights(model, config, resolved.weights)
        if start.checkpoint:
            restore_checkpoint(start.checkpoint, model, optimizer, state)
            verify_restored_state(start.folder, start.checkpoint, state.step, model, optimizer)

    with reporting_oom(plan):
        model = make_empty_model(plan)
        optimizer = make_optimizer(model, plan)
        init_on_all_ranks(model, optimizer, plan, group, load_values)
    if group.is_rank_0:
        session = make_session(collect_provenance(resolved.device), plan, state.step, start.changed)
        if start.checkpoint:
            warn_if_not_bit_exact(start.folder, session)
        write_run_records(start.folder, config, plan, dataset, session, resolved.weights)
    samples: Any = (
        Sampler(config, model, dataset, start.folder) if group.is_rank_0 and not plan.derived.shard else NoOp()
    )
    return Job(
        run=start.folder,
        plan=plan,
        model=model,
        optimizer=optimizer,
        dataset=dataset,
        tokenizer=dataset.tokenizer,
        state=state,
        stop=stop,
        sample=samples,
        started_from_weights=config.init_from != "scratch",
        group=group,
        fallback_plans=list_fallback_plans(config, plan.shape, resolved.target),
        lock_mark=start.lock_mark,
        check_dataset=make_dataset_check(dataset, start.folder),
    )


def train_with_rollback(job: Job) -> None:
    """Train; return to a checkpoint after an unfinished step or too many consecutive bad steps.

    Raises:
        MachineCannot: memory ran out and no smaller plan is left.
        TryAgain: the GPU failed, or another rank is lost.
        Gpt2boxError: see errors.py.
    """
    try:
        with job.stop.awaited(), translate_cuda_oom():
            while True:
                try:
                    return train(job)
                except UnfinishedStep:
                    restore_last_checkpoint(job)
                    continue
                except TooManyBadSteps as error:
                    bad_steps = error.with_traceback(None)  # the frames would keep the step's tensors alive
                roll_back(job, bad_steps)
    except torch.cuda.OutOfMemoryError as error:
        raise out_of_memory_error(job.plan) from error
    except (RuntimeError, MemoryError, OSError) as error:
        if known := machine_error(error, job):
            raise known from error
        raise


def evaluate_only(resolved: ResolvedRun, group: RankGroup) -> None:
    """Print the val_loss of the run's best checkpoint, or of the weights that a new run would start from."""
    config, plan = resolved.config, resolved.plan
    describe_plan(config, plan, resolved.target.name)
    if not group.is_rank_0:
        return
    run = run_dir(config.name)
    best = run / "checkpoints" / "best"
    began = loader.read_yaml(run / "config.yaml").get("init_from") if (run / "config.yaml").exists() else None
    of_run = best.exists() and began == config.init_from
    if plan.config.lora_rank:  # checkpoints have the adapters merged
        plan = plan.with_settings(lora_rank=0, weights_dtype="float32")
    plan = plan.with_derived(shard=False)  # rank 0 evaluates alone
    with reporting_oom(plan):
        model = make_empty_model(plan)
        if of_run:
            load_hf_weights(model, best)
        else:
            init_weights(model, config, resolved.weights)
        val_loss, val_set = evaluate(model, resolved.dataset, plan, RankGroup(SINGLE_PROCESS))
    print(f"val_loss {val_loss:.4f} ({best if of_run else config.init_from}, windows {val_set})")
