"""A training job from settings to report: what `gpt2box train` does, in order."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from gpt2box.checkpoint import retention
from gpt2box.checkpoint.loader import load_weights, restore_checkpoint
from gpt2box.checkpoint.metadata import TrainState, verify_model_files
from gpt2box.config import loader
from gpt2box.config.schema import Config
from gpt2box.config.validation import check_ranks
from gpt2box.data.dataset import Dataset
from gpt2box.data.pretrained import load_initial_shape, load_shape, pretrained_folder
from gpt2box.data.tokenizer import encode_prompt
from gpt2box.distributed.group import NoOp, RankGroup, join_rank_group
from gpt2box.evaluation.memorization import measure_memorization, read_memorization, show_before_and_after
from gpt2box.model.decoder import Decoder
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import load_hf_weights
from gpt2box.model.sampling import SamplingParams, generate
from gpt2box.model.shape import ModelShape
from gpt2box.optim.factory import Optimizer, make_optimizer
from gpt2box.planner.run_plan import RunPlan, make_run_plan
from gpt2box.preflight.preflight import check_gpu
from gpt2box.report.loss_plot import plot_loss
from gpt2box.report.page import published_val_loss, write_report
from gpt2box.runs import wandb
from gpt2box.runs.manifest import parse_allowed_changes, warn_if_not_bit_exact, write_run_records
from gpt2box.runs.sessions import make_session
from gpt2box.system.determinism import enable_determinism
from gpt2box.system.device import choose_compile, choose_device, choose_dtype, translate_cuda_oom
from gpt2box.system.host import explain_host_oom
from gpt2box.system.provenance import collect_provenance
from gpt2box.training.console import Display
from gpt2box.training.evaluate import evaluate
from gpt2box.training.job import Job
from gpt2box.training.model_setup import empty_model, init_on_all_ranks
from gpt2box.training.resolve import (
    check_sharding_support,
    choose_execution,
    list_fallback_plans,
    rank_device,
    target_device_for_run,
    weakest_device,
)
from gpt2box.training.resume import (
    acquire_run_lock,
    find_resume_point,
    load_or_prepare_dataset,
    make_dataset_check,
    verify_restored_state,
)
from gpt2box.training.rollback import (
    TooManyBadSteps,
    UnfinishedStep,
    machine_error,
    out_of_memory_error,
    restore_last_checkpoint,
    roll_back,
)
from gpt2box.training.trainer import train
from gpt2box.utils.files import write_atomically
from gpt2box.utils.paths import display_path, ensure_writable, in_image, run_dir, text_path
from gpt2box.utils.progress import format_bytes, format_duration, gpt2box_command, log_line, pluralize, run_log_file
from gpt2box.utils.ranks import SINGLE_PROCESS
from gpt2box.utils.signals import StopRequest


def run_job(argument: str | None, flags: dict[str, Any], stop: StopRequest, allow: Sequence[str] = ()) -> None:
    """Train, or go on, or say that it is done; `allow`: settings that a run may go on with another value of.

    Raises:
        Gpt2boxError: see errors.py; nothing is written before settings, dataset and device are checked.
    """
    allowed = parse_allowed_changes(allow)
    with join_rank_group() as group:
        config, notes = group.run_on_rank0(lambda: loader.load_config(argument, flags))
        run_in(group, config, notes, text_path(str(flags.get("dataset") or "")), argument, stop, allowed)


def run_config(config: Config, argument: str, stop: StopRequest) -> None:
    """The same, of settings that are read, whose dataset is there; `argument`: what the user gave."""
    with join_rank_group() as group:
        run_in(group, config, [], None, argument, stop)


def run_in(
    group: RankGroup,
    config: Config,
    notes: Sequence[str],
    text: Path | None,
    argument: str | None,
    stop: StopRequest,
    allow: Sequence[str] = (),
) -> None:
    """The same, on each rank of a group; `text`: what the dataset is made from."""
    group.run_on_rank0(lambda: check_ranks(config, group.ranks.world_size))
    wanted = rank_device(config.device, group.ranks)
    check_gpu(wanted)
    group.run_on_rank0(lambda: wandb.check_available(config.wandb))
    dataset = load_or_prepare_dataset(config, text, group)
    device = choose_device(wanted)
    compile_model, note = choose_compile(config.compile if config.may_compile else False, device)
    for line in [*notes, *([note] if note else [])]:
        log_line(f"note: {line}")
    weights, shape = group.run_on_rank0(lambda: model_shape(config, dataset))
    dtype = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    group.run_on_rank0(lambda: check_sharding_support(config, shape, group.ranks.world_size))
    place = weakest_device(group.all_gather(target_device_for_run(config, shape, device, dtype, compile_model)))
    if device.index:
        torch.cuda.set_device(device)  # else some of the first card's memory would be held, too
    option = group.run_on_rank0(lambda: choose_execution(config, shape, place))
    peak = place.spec.bf16_tflops if place.spec and place.on_gpu and place.dtype == "bfloat16" else 0.0
    plan = make_run_plan(config, shape, dataset.tokens("train"), str(device), place.dtype, option, peak)
    set_arithmetic(plan)

    if config.eval_only:
        describe_plan(config, plan, place.name)
        return evaluate_only(config, plan, dataset, weights) if group.is_rank_0 else None
    run = run_dir(config.name)
    with ExitStack() as held:
        mark = group.run_on_rank0(lambda: acquire_run_lock(config, run, held))
        describe_plan(config, plan, place.name)
        found, changed = group.run_on_rank0(lambda: find_resume_point(config, dataset, run, allow))
        state = found[1] if found else TrainState()
        if state.stopped_early and (config.patience == 0 or state.evaluations_without_best < config.patience):
            state.stopped_early = False  # the patience was raised
        unevaluated = (
            state.step == plan.config.max_steps != state.evaluated_step
        )  # stopped by a signal in the last step
        due = (state.step < plan.config.max_steps or unevaluated) and not state.stopped_early
        if due:
            with saying_out_of_memory(plan):
                model = empty_model(plan)
                optimizer = make_optimizer(model, plan)

                def values(model: GPT2, optimizer: Optimizer) -> None:
                    if not found or plan.config.lora_rank:
                        initialise(model, config, weights)
                    if found:
                        restore_checkpoint(found[0], model, optimizer, state)
                        verify_restored_state(run, found[0], state.step, model, optimizer)

                init_on_all_ranks(model, optimizer, plan, group, values)
            if group.is_rank_0:
                session = make_session(collect_provenance(device), plan, state.step, changed)
                if found:
                    warn_if_not_bit_exact(run, session)
                write_run_records(run, config, plan, dataset, session, weights)
            sampler: Any = (
                Sampler(config, model, dataset, run) if group.is_rank_0 and not plan.derived.shard else NoOp()
            )
            pretrained = config.init_from != "scratch"
            ways = list_fallback_plans(config, shape, place)
            job = Job(
                run, plan, model, optimizer, dataset, dataset.tokenizer, state, stop, sampler, pretrained, group, ways
            )
            job.lock_mark, job.check_dataset = mark, make_dataset_check(dataset, run)
            try:
                with stop.awaited(), translate_cuda_oom():
                    train_and_go_back(job)
            except torch.cuda.OutOfMemoryError as error:
                raise out_of_memory_error(job.plan) from error
            except (RuntimeError, MemoryError, OSError) as error:
                if fault := machine_error(error, job):
                    raise fault from error
                raise
            state = job.state
            if config.sample_tokens and not stop and group.is_rank_0 and not plan.derived.shard:
                look_back(config, job)
    if not group.is_rank_0:
        return
    with run_log_file(run / "log.txt"):
        report(config, argument, run, state, stop, plan, due)


def set_arithmetic(plan: RunPlan) -> None:
    """How products and sums are formed, for the rest of this process; before the first of them."""
    if plan.derived.deterministic:
        enable_determinism(plan.execution.compile)
    if not plan.derived.device.startswith("cpu"):
        torch.set_float32_matmul_precision("high")  # TF32 where a product is float32


def train_and_go_back(job: Job) -> None:
    """Train; where a step was half taken, or too many were bad in a row, go on from a checkpoint."""
    while True:
        try:
            return train(job)
        except UnfinishedStep:
            restore_last_checkpoint(job)
            continue
        except TooManyBadSteps as trouble:
            found = trouble.with_traceback(None)  # which would hold on to the frame, and with it to what a step needs
        roll_back(job, found)


def model_shape(config: Config, dataset: Dataset) -> tuple[Path | None, ModelShape]:
    """The folder of the weights to begin from, if any, and the network's shape.

    Raises:
        BadInput: the settings and the weights, or the weights and the dataset, do not fit.
    """
    if config.init_from == "scratch":
        shape = ModelShape(
            **config.shape(), block_size=config.block_size, vocab_size=dataset.tokenizer.vocab_size, bias=config.bias
        )
        return None, shape
    begun = retention.find_intact_config(run_dir(config.name) / "checkpoints")
    if begun and not config.eval_only and not config.lora_rank:  # going on; the first weights may be gone
        return None, load_shape(begun)
    folder = pretrained_folder(config.init_from)
    return folder, load_initial_shape(config, folder, dataset.tokenizer)


def initialise(model: GPT2, config: Config, weights: Path | None) -> None:
    """First weights: random by the seed, or read from a folder."""
    if weights:
        verify_model_files(weights)
        load_hf_weights(model, weights, rows=load_shape(weights).vocab_size)
    else:
        model.init_weights(config.seed)


def describe_plan(config: Config, plan: RunPlan, device: str) -> None:
    """What is about to happen, in a few lines."""
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
    recompute = (
        "" if execution.activation_checkpointing == "none" else f", {execution.activation_checkpointing} recompute"
    )
    log_line(
        f"  {device}; {derived.dtype}, {compiled}{recompute}; a checkpoint is {format_bytes(derived.checkpoint_bytes)}"
    )
    pace = execution.tokens_per_sec
    seconds = config.max_steps * config.tokens_per_step / pace if pace else 0
    speed = f"{pace:,.0f} tokens/s, {format_duration(seconds)} to the end" if pace else ""
    if derived.shard:
        log_line("  each rank keeps a share of weights, gradients and averages; samples are left to gpt2box sample")
    if derived.device != "cpu":
        estimated = "" if execution.measured or not speed else f"; {speed}"
        log_line(
            f"  estimated: {format_bytes(sum(execution.memory.components().values()))} of the card's memory{estimated}"
        )
    if execution.measured:
        log_line(f"  measured here (gpt2box bench): {speed}")


@contextmanager
def saying_out_of_memory(plan: RunPlan) -> Iterator[None]:
    """Outside training there is no way down."""
    try:
        with translate_cuda_oom(), explain_host_oom("the network is made"):
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise out_of_memory_error(plan) from error


def evaluate_only(config: Config, plan: RunPlan, dataset: Dataset, weights: Path | None) -> None:
    """val_loss of the run's best checkpoint, or, where no such run began so, of the weights it would begin from."""
    run = run_dir(config.name)
    best = run / "checkpoints" / "best"
    began = loader.read_yaml(run / "config.yaml").get("init_from") if (run / "config.yaml").exists() else None
    of_run = best.exists() and began == config.init_from
    if plan.config.lora_rank:  # its checkpoints have the adapters added in
        plan = plan.with_settings(lora_rank=0, weights_dtype="float32")
    plan = plan.with_derived(shard=False)  # the first rank evaluates by itself
    with saying_out_of_memory(plan):
        model = empty_model(plan)
        if of_run:
            load_hf_weights(model, best)
        else:
            initialise(model, config, weights)
        val_loss, val_set = evaluate(model, dataset, plan, RankGroup(SINGLE_PROCESS))
    print(f"val_loss {val_loss:.4f} ({best if of_run else config.init_from}, windows {val_set})")


class Sampler:
    """Writes samples/step-N.txt at each evaluation and shows the beginning."""

    def __init__(self, config: Config, model: GPT2, dataset: Dataset, run: Path) -> None:
        self.config, self.model, self.tokenizer, self.run = config, model, dataset.tokenizer, run

    def __call__(self, display: Display, step: int) -> None:
        if not self.config.sample_tokens:
            return
        text = self.config.sample_prompt
        prompt = encode_prompt(self.tokenizer, text)
        ids = list(generate(Decoder(self.model), prompt, self.config.sample_tokens, SamplingParams(), self.config.seed))
        text += self.tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")
        folder = ensure_writable(self.run / "samples")
        write_atomically(folder / f"step-{step:08d}.txt", text + "\n")
        first_or_last = step == 0 or step >= self.config.max_steps
        excerpt = text.strip().splitlines()[: None if first_or_last else 3]
        display.show_sample(excerpt)


def look_back(config: Config, job: Job) -> None:
    """What the weights that `sample` takes write, before and after, and whether it is the training text by heart."""
    step = kept_step(job.run, job.state)
    load_weights(job.run / "checkpoints" / retention.checkpoint_name(step), job.model)
    if job.started_from_weights and (columns := show_before_and_after(job.run, step)):
        log_line(columns)
    prompt, length = config.sample_prompt, config.sample_tokens
    try:
        measure_memorization(job.run, job.model, job.dataset, prompt, length, config.seed, step)
    except torch.cuda.OutOfMemoryError:
        log_line("note: not looked for what it knows by heart: out of memory")


def kept_step(run: Path, state: TrainState) -> int:
    """Of the best checkpoint, or, where none was better than the beginning, of the last."""
    return state.best_step if (run / "checkpoints" / "best").exists() else state.step


def report(
    config: Config, argument: str | None, run: Path, state: TrainState, stop: StopRequest, plan: RunPlan, trained: bool
) -> None:
    """How it ended, where everything lies, and the next command."""
    ended = "stopped early, no better val_loss" if state.stopped_early else "finished"
    if not trained and not stop and (run / "report.html").exists():
        more = ["--patience", f"{2 * config.patience}"] if state.stopped_early else ["--max-steps", f"{2 * state.step}"]
        log_line(f"{config.name}: {ended} at step {state.step:,} before; nothing is left to do")
        log_line(f"  to train longer {again(argument, plan, *more)}")
        return
    picture = plot_loss(run)
    if stop:
        retention = "saved" if (run / "checkpoints" / "last").exists() else "with nothing to save yet"
        log_line(f"stopped by {stop.name} at step {state.step:,} of {plan.config.max_steps:,}, {retention}")
        log_line(f"  to go on        {again(argument, plan)}")
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
    if memorization := read_memorization(run, kept_step(run, state)):
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


def again(argument: str | None, plan: RunPlan, *more: str) -> str:
    """The same command with more options: to paste, unless it is a container's or torchrun's."""
    if in_image() or plan.execution.ranks > 1:
        return " ".join(["the same command again", *(["with"] if more else []), *more])
    words = sys.argv[1:] if sys.argv[1:2] == ["train"] else ["train", *([argument] if argument else [])]
    return f"{'' if more else 'the same command again: '}{gpt2box_command(*words, *more)}"
