"""`gpt2box bench`: measure training speed, the cost of evaluation and checkpoints, and the fastest execution plan."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpt2box.bench import table
from gpt2box.bench.timing import PlanTiming, StepTimer, synthetic_dataset
from gpt2box.config.schema import Config
from gpt2box.data.dataset import Dataset, open_dataset
from gpt2box.errors import MachineCannot, VolumeUnwritable
from gpt2box.model.shape import ModelShape
from gpt2box.planner.bench_records import BenchKey, BenchRecord, bench_key, store_bench_records
from gpt2box.planner.model_shape import resolve_model_shape
from gpt2box.planner.run_plan import make_run_plan
from gpt2box.planner.search import CHECKPOINTING_MODES, choose_execution_plan, list_execution_plans
from gpt2box.planner.target_device import TargetDevice, apply_bench_records
from gpt2box.preflight.preflight import check_gpu
from gpt2box.preflight.requirements import has_dataset
from gpt2box.system import host
from gpt2box.system.device import choose_compile, peak_memory_bytes
from gpt2box.training.resolve import detect_target_device, resolve_device, set_arithmetic
from gpt2box.utils.paths import bench_file, dataset_dir, display_path, ensure_writable, runs_dir
from gpt2box.utils.progress import format_bytes, log_line

SWEEP_ROUNDS = 3  # rounds of a sweep; each round times every execution plan once
SWEEP_SIZES = 3  # a sweep tries this many of the largest micro-batches per compile and checkpointing mode
MAX_SWEEP_MEMORY_FACTOR = 1.2  # on a GPU, a sweep tries one plan whose estimate exceeds free memory by this factor


@dataclass(frozen=True)
class BenchTask:
    """The settings, the model shape and the device of one benchmark."""

    config: Config
    shape: ModelShape
    target: TargetDevice  # without earlier bench records
    device: torch.device
    can_compile: bool  # also false if the settings forbid it

    @property
    def key(self) -> BenchKey:
        """Return the key under which records are stored."""
        return bench_key(self.target.bench_name, self.config, self.shape, self.target.dtype)


def bench(config: Config, steps: int, sweep: bool, share: bool, as_json: bool) -> None:
    """Run the benchmark and print its results on standard output.

    Raises:
        MachineCannot: Nothing fits, or the GPU does not exist.
        VolumeUnwritable: The records of a sweep cannot be stored.
        KeyboardInterrupt, SystemExit: On Ctrl-C or SIGTERM, after storing and printing the results so far.
    """
    check_gpu(config.device)
    if sweep:
        ensure_writable(runs_dir())
    warn_of_high_load()
    task = resolve_task(config)
    timings = sweep_plans(task) if sweep else []
    timings = timings or [training_plan(task)]
    peak = task.target.spec.bf16_tflops if task.target.spec and task.target.dtype == "bfloat16" else 0.0
    plan = make_run_plan(config, task.shape, 0, str(task.device), task.target.dtype, timings[0].execution, peak)
    set_arithmetic(plan)
    costs: dict[str, Any] = {}
    stopped = None
    with open_or_synthesize_dataset(task) as dataset, translate_oom(timings[0]):
        timer = StepTimer(plan, dataset)
        on = config.dataset if dataset.manifest else "random tokens"
        each = f" with each of {len(timings)} execution plans, alternating" if sweep else ""
        log_line(f"{config.name} on {task.target.bench_name or task.target.name}, {on}: {steps} steps{each}")
        try:
            time_plans(timer, timings, steps, task, sweep)
            if ranked := rank_by_speed(timings, task):
                measure_other_costs(timer, ranked[0][0], costs, is_only_plan=not sweep)
        except (KeyboardInterrupt, SystemExit) as error:
            stopped = error
    free = task.target.free_bytes
    if sweep:  # also after an interruption
        store_bench_records(bench_file(), [each.record(task.key, free) for each in timings if each.is_recordable])
    ranked = rank_by_speed(timings, task)
    failed = [timing for timing in timings if timing.fault]
    figures = table.build_results(config, plan, task.target, ranked, failed, costs)
    figures["interrupted"] = stopped is not None
    if as_json:
        print(json.dumps(figures, indent=2))
    elif ranked and share:
        print(table.format_share_row(figures))
    elif ranked:
        print("\n".join(table.format_lines(figures)))
    if ranked and sweep:
        log_line(f"saved in {display_path(bench_file())}: plan and train use it for settings that are auto")
    if stopped is not None:
        raise stopped
    if not ranked:
        raise too_large_error(timings[0], "; ".join(sorted({timing.fault for timing in timings})))


def warn_of_high_load() -> None:
    """Warn that other programs distort the measurement."""
    load, cores = os.getloadavg()[0], host.cpu_cores()
    if load > cores:
        log_line(f"note: load {load:.0f} on {cores:g} core{'s' * (cores != 1)}: other work slows this")


def resolve_task(config: Config) -> BenchTask:
    """Resolve device, dtype, compilation and model shape as training does."""
    device, dtype, compiled = resolve_device(config)
    can_compile = config.may_compile and choose_compile(True, device)[0]
    return BenchTask(
        config, resolve_model_shape(config), detect_target_device(device, dtype, compiled), device, can_compile
    )


def training_plan(task: BenchTask) -> PlanTiming:
    """Choose the execution plan of a new run, with estimated instead of measured speed and memory.

    Raises:
        MachineCannot: Nothing fits.
    """
    config, shape = task.config, task.shape
    known = apply_bench_records(task.target, config, shape, task.can_compile)
    chosen = choose_execution_plan(list_execution_plans(config, shape, known), config, shape, known)
    plain = list_execution_plans(config, shape, replace(known, bench_records=[]))
    settings = (chosen.micro_batch_size, chosen.activation_checkpointing)
    return PlanTiming(next(o for o in plain if (o.micro_batch_size, o.activation_checkpointing) == settings))


def sweep_plans(task: BenchTask) -> list[PlanTiming]:
    """List the plans of a sweep: the largest micro-batches that (nearly) fit, per compile and checkpointing mode."""
    free, found = task.target.free_bytes, []
    kinds = [False, True] if task.config.compile == "auto" and task.can_compile else [task.target.compiled]
    for compiled in kinds:
        plans = list_execution_plans(task.config, task.shape, replace(task.target, compiled=compiled))
        for mode in CHECKPOINTING_MODES:
            same = [plan for plan in plans if plan.activation_checkpointing == mode]
            same.sort(key=lambda plan: plan.micro_batch_size)
            fits = [plan for plan in same if plan.memory.total <= free]
            oversized = [plan for plan in same if free < plan.memory.total <= MAX_SWEEP_MEMORY_FACTOR * free]
            # On a CPU, running out of memory ends the process, and compiling takes longer than most measurements.
            sizes = SWEEP_SIZES if task.target.on_gpu or not compiled else 1
            tried = fits[-sizes:] + (oversized[:1] if task.target.on_gpu else [])
            found += [PlanTiming(plan) for plan in tried]
    return found


def time_plans(timer: StepTimer, timings: list[PlanTiming], steps: int, task: BenchTask, sweep: bool) -> None:
    """Time all plans, alternating between them. A sweep stores its records after each measurement."""
    rounds = min(SWEEP_ROUNDS, steps) if sweep else 1
    for round_index in range(rounds):
        for timing in timings:
            if timing.fault:
                continue
            timer.time_steps(timing, -(-steps // rounds))
            if sweep and timing.is_recordable:
                store_bench_records(bench_file(), [timing.record(task.key, task.target.free_bytes)])
            if sweep and round_index == 0:
                outcome = timing.fault or table.format_rate(rank_by_speed([timing], task)[0][2])
                log_line(f"  {timing.describe()}: {outcome}")


def rank_by_speed(timings: list[PlanTiming], task: BenchTask) -> list[tuple[PlanTiming, BenchRecord, float]]:
    """Return the timed plans, their records, and tokens per second at the configured step size, fastest first."""
    records = [(timing, timing.record(task.key, task.target.free_bytes)) for timing in timings if timing.is_timed]
    rated = [(timing, record, record.tokens_per_sec(timing.execution.grad_accum_steps)) for timing, record in records]
    return sorted(rated, key=lambda each: -each[2])


def measure_other_costs(timer: StepTimer, timing: PlanTiming, costs: dict[str, Any], is_only_plan: bool) -> None:
    """Measure dataloader, evaluation and checkpoint with the fastest plan; store each figure in `costs` at once.

    `is_only_plan`: the process ran no other plan, so its peak memory belongs to this one.
    """
    timer.use_plan(timing)
    if timer.device.type == "cpu" and is_only_plan:
        costs["memory_bytes"] = max(peak_memory_bytes(timer.device) - timer.baseline_bytes, 0)
    costs["loader_s"] = timer.time_loader()
    costs["evaluation_s"], costs["evaluation_windows"] = timer.time_evaluation()
    try:
        found = timer.time_checkpoint(ensure_writable(runs_dir()))
        costs["checkpoint_s"], costs["checkpoint_durable_s"], costs["checkpoint_bytes"] = found
    except VolumeUnwritable as fault:
        costs["checkpoint_fault"] = fault.found


@contextmanager
def open_or_synthesize_dataset(task: BenchTask) -> Iterator[Dataset]:
    """Open the configured dataset, or random tokens if it does not exist."""
    if has_dataset(task.config):
        yield open_dataset(dataset_dir(task.config.dataset))
    else:
        with synthetic_dataset(task.shape) as dataset:
            yield dataset


@contextmanager
def translate_oom(timing: PlanTiming) -> Iterator[None]:
    """Report a GPU without memory for weights and optimizer state."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise too_large_error(timing, "out of memory") from error


def too_large_error(timing: PlanTiming, fault: str) -> MachineCannot:
    """Return the error for a benchmark in which no plan could be measured."""
    return MachineCannot(
        f"nothing could be measured: {fault}; "
        f"estimated: {format_bytes(timing.execution.memory.total)} ({timing.describe()})",
        "memory for one sequence",
        "close other programs (gpt2box monitor), or use a smaller model or block_size",
    )
