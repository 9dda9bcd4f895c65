"""`gpt2box bench`: how fast this machine trains, what evaluation and checkpoints cost, and, swept, the fastest way."""

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

SWEEP_ROUNDS = 3  # of a sweep: so often has each way its turn
SWEEP_SIZES = 3  # the largest micro-batches of each kind that a sweep tries
MAX_SWEEP_MEMORY_FACTOR = 1.2  # of the free memory: on a card, the next that is estimated to take so much is tried, too


@dataclass(frozen=True)
class BenchTask:
    """What is measured, and where."""

    config: Config
    shape: ModelShape
    place: TargetDevice  # without what was measured there before
    device: torch.device
    can_compile: bool  # where the settings leave it open, too

    @property
    def job(self) -> BenchKey:
        """What the records hold for."""
        return bench_key(self.place.bench_name, self.config, self.shape, self.place.dtype)


def bench(config: Config, steps: int, sweep: bool, share: bool, as_json: bool) -> None:
    """Measure, and print what came of it on standard output.

    Raises:
        MachineCannot: nothing fits, or no such GPU.
        VolumeUnwritable: what a sweep finds could not be kept.
        KeyboardInterrupt, SystemExit: at Ctrl-C or SIGTERM, after what was measured until then is kept and printed.
    """
    check_gpu(config.device)
    if sweep:
        ensure_writable(runs_dir())
    warn_of_high_load()
    task = resolve_task(config)
    ways = sweep_plans(task) if sweep else []
    ways = ways or [training_plan(task)]
    peak = task.place.spec.bf16_tflops if task.place.spec and task.place.dtype == "bfloat16" else 0.0
    plan = make_run_plan(config, task.shape, 0, str(task.device), task.place.dtype, ways[0].execution, peak)
    set_arithmetic(plan)
    beside: dict[str, Any] = {}
    stopped = None
    with open_or_synthesize_dataset(task) as dataset, translate_oom(ways[0]):
        watch = StepTimer(plan, dataset)
        on = config.dataset if dataset.manifest else "random tokens"
        each = f" of each of {len(ways)} ways, in turns" if sweep else ""
        log_line(f"{config.name} on {task.place.bench_name or task.place.name}, {on}: {steps} steps{each}")
        try:
            time_plans(watch, ways, steps, task, sweep)
            if done := rank_by_speed(ways, task):
                measure_other_costs(watch, done[0][0], beside, alone=not sweep)
        except (KeyboardInterrupt, SystemExit) as error:
            stopped = error
    if sweep:  # also of a turn that was broken off
        store_bench_records(bench_file(), [way.record(task.job, task.place.free_bytes) for way in ways if way.known])
    done = rank_by_speed(ways, task)
    figures = table.build_results(config, plan, task.place, done, [way for way in ways if way.fault], beside)
    figures["interrupted"] = stopped is not None
    if as_json:
        print(json.dumps(figures, indent=2))
    elif done and share:
        print(table.format_share_row(figures))
    elif done:
        print("\n".join(table.format_lines(figures)))
    if done and sweep:
        log_line(f"kept in {display_path(bench_file())}: plan and train go by it where a setting is auto")
    if stopped is not None:
        raise stopped
    if not done:
        raise too_large_error(ways[0], "; ".join(sorted({way.fault for way in ways})))


def warn_of_high_load() -> None:
    """Beside other work the figures are not the machine's."""
    load, cores = os.getloadavg()[0], host.cpu_cores()
    if load > cores:
        log_line(f"note: load {load:.0f} on {cores:g} core{'s' * (cores != 1)}: other work slows this")


def resolve_task(config: Config) -> BenchTask:
    """What training would look at first."""
    device, dtype, compiled = resolve_device(config)
    can_compile = config.may_compile and choose_compile(True, device)[0]
    return BenchTask(
        config, resolve_model_shape(config), detect_target_device(device, dtype, compiled), device, can_compile
    )


def training_plan(task: BenchTask) -> PlanTiming:
    """The way in which a new run would be trained, with what is estimated of it.

    Raises:
        MachineCannot: nothing fits.
    """
    config, shape = task.config, task.shape
    known = apply_bench_records(task.place, config, shape, task.can_compile)
    chosen = choose_execution_plan(list_execution_plans(config, shape, known), config, shape, known)
    plain = list_execution_plans(config, shape, replace(known, bench_records=[]))
    way = (chosen.micro_batch_size, chosen.activation_checkpointing)
    return PlanTiming(next(o for o in plain if (o.micro_batch_size, o.activation_checkpointing) == way))


def sweep_plans(task: BenchTask) -> list[PlanTiming]:
    """What a sweep tries: compiled and not, each kind of recompute, the largest micro-batches that fit or nearly do."""
    free, found = task.place.free_bytes, []
    kinds = [False, True] if task.config.compile == "auto" and task.can_compile else [task.place.compiled]
    for compiled in kinds:
        left_open = list_execution_plans(task.config, task.shape, replace(task.place, compiled=compiled))
        for mode in CHECKPOINTING_MODES:
            same = [option for option in left_open if option.activation_checkpointing == mode]
            same.sort(key=lambda option: option.micro_batch_size)
            fits = [option for option in same if option.memory.total <= free]
            beyond = [option for option in same if free < option.memory.total <= MAX_SWEEP_MEMORY_FACTOR * free]
            # On a CPU, running out of memory ends the process, and compiling takes longer than most tries.
            sizes = SWEEP_SIZES if task.place.on_gpu or not compiled else 1
            tried = fits[-sizes:] + (beyond[:1] if task.place.on_gpu else [])
            found += [PlanTiming(option) for option in tried]
    return found


def time_plans(watch: StepTimer, ways: list[PlanTiming], steps: int, task: BenchTask, sweep: bool) -> None:
    """Time all ways, each in several turns; of a sweep, what is known after a turn is kept."""
    rounds = min(SWEEP_ROUNDS, steps) if sweep else 1
    for number in range(rounds):
        for way in ways:
            if way.fault:
                continue
            watch.turn(way, -(-steps // rounds))
            if sweep and way.known:
                store_bench_records(bench_file(), [way.record(task.job, task.place.free_bytes)])
            if sweep and number == 0:
                log_line(f"  {way.words()}: {way.fault or table.format_rate(rank_by_speed([way], task)[0][2])}")


def rank_by_speed(ways: list[PlanTiming], task: BenchTask) -> list[tuple[PlanTiming, BenchRecord, float]]:
    """The ways that were timed, with their records and tokens a second in the config's step, fastest first."""
    records = [(way, way.record(task.job, task.place.free_bytes)) for way in ways if way.done]
    rated = [(way, record, record.tokens_per_sec(way.execution.grad_accum_steps)) for way, record in records]
    return sorted(rated, key=lambda each: -each[2])


def measure_other_costs(watch: StepTimer, way: PlanTiming, beside: dict[str, Any], alone: bool) -> None:
    """What else training does, in the fastest way: loader, evaluation, checkpoint. Written down one by one.

    `alone`: no other way was tried in this process, so that its highest memory is this one's.
    """
    watch.use(way)
    if watch.device.type == "cpu" and alone:
        beside["memory_bytes"] = max(peak_memory_bytes(watch.device) - watch.before_bytes, 0)
    beside["loader_s"] = watch.loader_s()
    beside["evaluation_s"], beside["evaluation_windows"] = watch.evaluation_s()
    try:
        found = watch.checkpoint_s(ensure_writable(runs_dir()))
        beside["checkpoint_s"], beside["checkpoint_durable_s"], beside["checkpoint_bytes"] = found
    except VolumeUnwritable as fault:
        beside["checkpoint_fault"] = fault.found


@contextmanager
def open_or_synthesize_dataset(task: BenchTask) -> Iterator[Dataset]:
    """The config's where it is there, else random tokens."""
    if has_dataset(task.config):
        yield open_dataset(dataset_dir(task.config.dataset))
    else:
        with synthetic_dataset(task.shape) as dataset:
            yield dataset


@contextmanager
def translate_oom(way: PlanTiming) -> Iterator[None]:
    """Where not even the weights and averages find memory."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise too_large_error(way, "out of memory") from error


def too_large_error(way: PlanTiming, fault: str) -> MachineCannot:
    """What to do where no way could be measured."""
    return MachineCannot(
        f"nothing could be measured: {fault}; estimated: {format_bytes(way.execution.memory.total)} ({way.words()})",
        "memory for one sequence",
        "close other programs (gpt2box monitor), or a smaller model or block_size",
    )
