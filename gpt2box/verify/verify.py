"""`gpt2box verify`: repeat steps of a run and compare the result bit for bit.

Nothing is written. The steps use the training loop's StepExecutor, without evaluations and checkpoints; the results are
compared in memory with the fingerprints in metrics.jsonl and with the tensors of the run's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2box.checkpoint.fingerprint import fingerprint_run_state
from gpt2box.checkpoint.loader import restore_checkpoint
from gpt2box.checkpoint.metadata import TrainState, load_verified_state, parse_state
from gpt2box.checkpoint.retention import checkpoint_name
from gpt2box.checkpoint.writer import ADAPTERS_FILE, optimizer_tensors
from gpt2box.config.schema import Config
from gpt2box.config.validation import validate
from gpt2box.data.dataset import Dataset, open_dataset
from gpt2box.data.pretrained import load_initial_shape, pretrained_folder
from gpt2box.errors import Damaged
from gpt2box.model.hf_weights import hf_state_dict
from gpt2box.model.lora import lora_parameters
from gpt2box.model.shape import ModelShape
from gpt2box.optim.factory import make_optimizer
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.run_plan import RunPlan, make_run_plan
from gpt2box.planner.search import list_execution_plans
from gpt2box.preflight.preflight import check_gpu
from gpt2box.runs.manifest import describe_dataset, describe_weights, is_same_dataset, read_manifest
from gpt2box.runs.sessions import make_session, session_differences
from gpt2box.system.provenance import collect_provenance
from gpt2box.training.model_setup import init_weights, make_empty_model
from gpt2box.training.resolve import detect_target_device, resolve_device, resolve_shape, set_arithmetic
from gpt2box.training.step import StepExecutor
from gpt2box.utils.paths import dataset_dir
from gpt2box.utils.progress import log_line
from gpt2box.verify.verify_range import StepRange, find_step_range, verify_command


@dataclass
class Verification:
    """The result of a comparison."""

    run: str
    start: int
    end: int  # last compared step
    compared: list[int] = field(default_factory=list)
    same_up_to: int = 0
    first_different_step: int | None = None
    tensor: str = ""  # first has_changed tensor, if a checkpoint shows it
    amount: str = ""
    environment: list[str] = field(default_factory=list)  # differences between the two sessions
    next_step: str = ""  # a command to try, or ""

    @property
    def same(self) -> bool:
        """Return True if all compared bits are equal."""
        return self.first_different_step is None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"same": self.same, **asdict(self)}

    def lines(self) -> list[str]:
        """Format the result for the terminal."""
        if self.same:
            places = f"{len(self.compared)} place{'s' * (len(self.compared) > 1)}"
            return [f"{self.run}: steps {self.start + 1:,} to {self.end:,} come to the same bits ({places} compared)"]
        lines = [f"{self.run}: step {self.first_different_step:,} is the first that was found to differ"]
        lines.append(f"  the same        up to step {self.same_up_to:,}")
        unnamed = "not known: no checkpoint of such a step is kept (--steps up to one that is, or --from one before)"
        lines.append(f"  tensor          {self.tensor + ', ' + self.amount if self.tensor else unnamed}")
        none = "nothing that is recorded: try again; where it differs each time, memory or processor may be at fault"
        lines += [f"  {'then and now' if i == 0 else '':14}  {x}" for i, x in enumerate(self.environment or [none])]
        return lines + ([f"  next            {self.next_step}"] if self.next_step else [])


def verify(run: Path, start_at: str | None, steps: int | None) -> Verification:
    """Repeat steps of a run, from its beginning or a checkpoint, and compare.

    Raises:
        BadInput: There is no such checkpoint, or nothing to compare with.
        Damaged: The dataset, the initial weights or the checkpoint have changed.
    """
    step_range = find_step_range(run, start_at, steps)
    executor, executions, now = prepare_repeat(step_range)
    result = Verification(run.name, step_range.start, step_range.start, same_up_to=step_range.start)
    result.environment = session_differences(step_range.session, now)
    for step in repeat_steps(executor, executions, step_range.end):
        if step not in step_range.steps:
            continue
        has_changed = step_range.digests.get(step) not in (
            None,
            fingerprint_run_state(executor.model, executor.optimizer),
        )
        if step in step_range.checkpoints:
            result.tensor, result.amount = find_first_difference(executor, step_range.checkpoints[step])
        result.compared.append(step)
        result.end = step
        if result.same and (has_changed or result.tensor):
            result.first_different_step = step
        elif result.same:
            result.same_up_to = step
        log_line(f"  step {step:,}: {'the same' if result.same else 'different'}")
        if not result.same and (result.tensor or not any(later > step for later in step_range.checkpoints)):
            break
    if not result.same:
        result.next_step = suggest_thread_count(step_range, now)
    return result


def suggest_thread_count(step_range: StepRange, now: dict[str, Any]) -> str:
    """Return a command with the original number of threads, if nothing else that changes bits differs."""
    cpu, bit_differences = step_range.session.get("cpu"), session_differences(step_range.session, now, bits_only=True)
    threads = cpu.get("threads") if isinstance(cpu, dict) else None
    known = ("cpu.threads", "environment.OMP_NUM_THREADS")
    if (
        type(threads) is not int
        or threads == now["cpu"]["threads"]
        or not all(x.startswith(known) for x in bit_differences)
    ):
        return ""
    return f"OMP_NUM_THREADS={threads} {verify_command(step_range.run, step_range.start, step_range.end)}"


def prepare_repeat(step_range: StepRange) -> tuple[StepExecutor, dict[int, ExecutionPlan], dict[str, Any]]:
    """Restore the state before the first step of the range.

    Returns the executor, later changes of the execution plan by step, and the record of the current session.

    Raises:
        BadInput, MachineCannot: The device or the weights do not exist here.
        Damaged: The dataset, the weights or the checkpoint have changed.
    """
    config, run, start = with_session_plan(step_range, step_range.session["way"]), step_range.run, step_range.start
    check_gpu(config.device)
    manifest = read_manifest(run)
    dataset = open_dataset(dataset_dir(config.dataset))
    if not is_same_dataset(manifest["dataset"]["splits"], now := describe_dataset(dataset, manifest)["splits"]):
        raise Damaged(
            f"the dataset in {dataset.folder} is {now}", f"what the run began with: {manifest['dataset']['splits']}"
        )
    weights = (
        find_initial_weights(config, manifest)
        if config.init_from != "scratch" and (start == 0 or config.lora_rank)
        else None
    )
    shape = resolve_shape(config, dataset)[1]
    if weights:
        shape = load_initial_shape(config, weights, dataset.tokenizer)
    plan, device = make_session_run_plan(config, shape, dataset)
    target = detect_target_device(device, config.dtype, plan.execution.compile)
    executions = {
        step: list_execution_plans(with_session_plan(step_range, way), shape, target)[0]
        for step, way in step_range.ways.items()
    }
    folder = run / "checkpoints" / checkpoint_name(start)
    state = load_verified_state(folder) if start else TrainState()
    last = run / "checkpoints" / "last"
    state.rollbacks = parse_state(last)[0].rollbacks if last.exists() else state.rollbacks
    set_arithmetic(plan)
    model = make_empty_model(plan)
    optimizer = make_optimizer(model, plan)
    if start == 0 or plan.config.lora_rank:
        init_weights(model, config, weights)
    if start:
        restore_checkpoint(folder, model, optimizer, state)
    return (
        StepExecutor(plan, model, optimizer, dataset, state),
        executions,
        make_session(collect_provenance(device), plan, start, {}),
    )


def with_session_plan(step_range: StepRange, execution: dict[str, Any]) -> Config:
    """Return the settings with the execution plan of a session."""
    known = {key: execution[key] for key in execution if key in Config.model_fields}
    return validate(step_range.config.model_dump() | known, f"the execution plan in {step_range.run / 'manifest.json'}")


def find_initial_weights(config: Config, manifest: dict[str, Any]) -> Path:
    """Return the folder of the run's initial weights.

    Raises:
        Damaged: Their checksum differs from the manifest's.
    """
    folder = pretrained_folder(config.init_from)
    expected = manifest.get("weights")
    expected = expected.get("sha256") if isinstance(expected, dict) else None
    if expected and (found := describe_weights(config.init_from, folder)["sha256"]) != expected:
        raise Damaged(f"the weights in {folder} are {found}", f"those that the run began from: {expected}")
    return folder


def make_session_run_plan(config: Config, shape: ModelShape, dataset: Dataset) -> tuple[RunPlan, torch.device]:
    """Make the run plan of the original session for a device of this machine."""
    device, _, compiled = resolve_device(config)
    execution = list_execution_plans(config, shape, detect_target_device(device, config.dtype, compiled))[0]
    return make_run_plan(config, shape, dataset.tokens("train"), str(device), config.dtype, execution), device


def repeat_steps(executor: StepExecutor, executions: dict[int, ExecutionPlan], last: int) -> Iterator[int]:
    """Repeat the steps up to `last` with their original execution plans; yield each step number."""
    executor.model.train()
    # At these steps the run skipped data, or changed its execution plan.
    breaks = {rollback.step for rollback in executor.state.rollbacks} | executions.keys()
    with closing(executor):
        for end in [*sorted(step for step in breaks if executor.state.step < step < last), last]:
            while executor.state.step < end:
                executor.take()
                yield executor.state.step
            if end in executions and end < last:
                log_line(f"  after step {end:,} with {executions[end].describe()}, as then")
            executor.use_plan(replace(executor.plan, execution=executions.get(end, executor.plan.execution)))


def find_first_difference(executor: StepExecutor, folder: Path) -> tuple[str, str]:
    """Return the first tensor, in model order, that differs from a checkpoint, and a description, or ("", "").

    Raises:
        Damaged: The checkpoint is damaged.
    """
    state = load_verified_state(folder)
    files: list[tuple[str, dict[str, Tensor]]] = [("model.safetensors", hf_state_dict(executor.model))]
    if trained := lora_parameters(executor.model):
        files.append((ADAPTERS_FILE, {name: parameter.detach() for name, parameter in trained.items()}))
    if state.optimizer_steps:
        files.append(("optimizer.safetensors", dict(optimizer_tensors(executor.model, executor.optimizer))))
    for name, tensors in files:
        try:
            with safe_open(folder / name, framework="pt") as stored:
                present = set(stored.keys())
                for key, tensor in tensors.items():
                    if key not in present:
                        return key, f"not in {folder / name}"
                    if amount := describe_difference(stored.get_tensor(key), tensor.detach().cpu().contiguous()):
                        return key, amount
        except SafetensorError as error:
            raise Damaged(f"{folder / name}: {error}", "a complete safetensors file") from error
    return "", ""


def describe_difference(before: Tensor, now: Tensor) -> str:
    """Describe how many values of two tensors differ and by how much at most; "" if the bits are equal."""
    if before.shape != now.shape or before.dtype != now.dtype:
        return f"{tuple(before.shape)} {before.dtype} before, {tuple(now.shape)} {now.dtype} now"
    if torch.equal(before.reshape(-1).view(torch.uint8), now.reshape(-1).view(torch.uint8)):
        return ""
    apart = (before.double() - now.double()).abs()
    return f"{int((apart != 0).sum()):,} of {before.numel():,} numbers, by {float(apart.max()):.3g} at most"
