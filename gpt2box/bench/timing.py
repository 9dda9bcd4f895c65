"""Time training steps, the dataloader, an evaluation and a checkpoint for `gpt2box bench`.

All execution plans share one model and one optimizer, so the timer can alternate between them, and other load on the
machine affects all alike. The device is synchronized only before and after a timed block.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from gpt2box import __version__
from gpt2box.checkpoint.async_writer import AsyncCheckpointWriter
from gpt2box.checkpoint.metadata import TrainState
from gpt2box.checkpoint.retention import checkpoint_name
from gpt2box.data.dataloader import PREFETCH, val_window_starts
from gpt2box.data.dataset import Dataset
from gpt2box.data.tokenizer import CharTokenizer
from gpt2box.distributed.group import RankGroup
from gpt2box.model.shape import ModelShape
from gpt2box.optim.factory import make_optimizer
from gpt2box.planner import bench_records
from gpt2box.planner.bench_records import LONG_STEP_MICRO_STEPS, BenchRecord
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.memory import CUDA_CONTEXT_BYTES
from gpt2box.planner.run_plan import RunPlan
from gpt2box.planner.search import MAX_MICRO_BATCH_TOKENS
from gpt2box.system.device import peak_memory_bytes
from gpt2box.training.evaluate import evaluate
from gpt2box.training.model_setup import make_empty_model
from gpt2box.training.step import StepExecutor
from gpt2box.utils.progress import log_line
from gpt2box.utils.ranks import SINGLE_PROCESS

MICRO_STEP_COUNTS = (1, LONG_STEP_MICRO_STEPS)  # micro-steps of the timed steps
TIMED_BATCHES = 20
MAX_REPEATS = 3  # of an evaluation or a checkpoint faster than REPEAT_BELOW_S
REPEAT_BELOW_S = 5.0
OUT_OF_MEMORY = "out of memory"
MIN_SYNTHETIC_WINDOWS = 64


@dataclass
class PlanTiming:
    """An execution plan and the measured seconds per step, by number of micro-steps."""

    execution: ExecutionPlan
    seconds: dict[int, list[float]] = field(default_factory=lambda: {count: [] for count in MICRO_STEP_COUNTS})
    peak_bytes: int = 0  # peak GPU memory including the CUDA context; 0 on a CPU
    fault: str = ""  # why the plan fails on this machine

    @property
    def is_timed(self) -> bool:
        """Return True if steps of each size were timed."""
        return not self.fault and all(self.seconds.values())

    @property
    def is_recordable(self) -> bool:
        """Return True if the plan was timed or ran out of memory."""
        return self.is_timed or self.fault == OUT_OF_MEMORY

    def record(self, job: bench_records.BenchKey, free_bytes: int) -> BenchRecord:
        """Return the record for the bench file."""
        one, many = (statistics.median(self.seconds[n]) if self.is_timed else 0.0 for n in MICRO_STEP_COUNTS)
        return BenchRecord(
            job=job,
            micro_batch_size=self.execution.micro_batch_size,
            activation_checkpointing=self.execution.activation_checkpointing,
            compiled=self.execution.compile,
            fits=self.is_timed,
            free_bytes=free_bytes,
            peak_bytes=self.peak_bytes,
            one_s=one,
            many_s=many,
            when=time.strftime("%Y-%m-%d"),
            gpt2box=__version__,
        )

    def describe(self) -> str:
        """Describe the plan by its settings."""
        return f"{self.execution.describe()}, {'compiled' if self.execution.compile else 'not compiled'}"


class StepTimer:
    """Executes and times training steps with one model, optimizer and dataset."""

    def __init__(self, plan: RunPlan, dataset: Dataset) -> None:
        self.device = torch.device(plan.derived.device)
        self.baseline_bytes = peak_memory_bytes(self.device)  # on a CPU: Python and PyTorch themselves
        self.model = make_empty_model(plan)
        self.model.init_weights(plan.config.seed)
        self.model.train()
        self.optimizer = make_optimizer(self.model, plan)
        state = TrainState(optimizer_steps=1)
        self.executor = StepExecutor(plan, self.model, self.optimizer, dataset, state)

    def time_steps(self, timing: PlanTiming, steps: int) -> None:
        """Time `steps` more steps of each size; record running out of memory as a fault."""
        try:
            self._time_steps(timing, steps)
            return
        except torch.cuda.OutOfMemoryError:
            timing.fault = OUT_OF_MEMORY
        except Exception as error:
            if not timing.execution.compile:
                raise
            lines = str(error).splitlines() or [""]  # the compiler raises many exception types
            timing.fault = f"not compiled: {type(error).__name__} {lines[0]}"
        self.free_memory()  # after the except block: a handled exception keeps the step's tensors alive

    def _time_steps(self, timing: PlanTiming, steps: int) -> None:
        self.use_plan(timing)
        with closing(self.executor):
            for number in range(-1 if any(timing.seconds.values()) else -2, steps):  # negative: warm-up
                for micro_steps in MICRO_STEP_COUNTS:
                    plan = self.executor.plan.with_execution(grad_accum_steps=micro_steps)
                    self.executor.use_plan(plan, keep_batches=True)
                    with self.timed() as seconds:
                        self.executor.take()
                    if number >= 0:
                        timing.seconds[micro_steps] += seconds
        if self.device.type == "cuda":
            timing.peak_bytes = max(timing.peak_bytes, torch.cuda.max_memory_reserved(self.device) + CUDA_CONTEXT_BYTES)

    def use_plan(self, timing: PlanTiming) -> None:
        """Use this execution plan for the next steps."""
        self.free_memory()
        self.executor.use_plan(replace(self.executor.plan, execution=timing.execution))

    @contextmanager
    def timed(self) -> Iterator[list[float]]:
        """Measure the seconds of a block, including its queued GPU work."""
        seconds: list[float] = []
        self.synchronize()
        started = time.perf_counter()
        yield seconds
        self.synchronize()
        seconds.append(time.perf_counter() - started)

    def synchronize(self) -> None:
        """Wait until the GPU has finished its queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free_memory(self) -> None:
        """Free gradients and cached GPU memory, and reset the peak."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def time_loader(self) -> float:
        """Return the seconds for loading one micro-batch without concurrent work."""
        with closing(self.executor.open_batches()) as batches:
            for _ in range(PREFETCH + 1):
                next(batches)
            started = time.perf_counter()
            for _ in range(TIMED_BATCHES):
                next(batches)
            return (time.perf_counter() - started) / TIMED_BATCHES

    def time_evaluation(self) -> tuple[float, int]:
        """Return the seconds of a full evaluation (extrapolated from a few windows) and its windows."""
        plan, dataset = self.executor.plan, self.executor.dataset
        windows = plan.config.eval_windows
        if dataset.manifest or not windows:
            windows = len(val_window_starts(dataset.tokens("val"), plan.shape.block_size, plan.config.eval_windows))
        measured_windows = min(windows, 2 * plan.eval_batch_size)
        plan = plan.with_settings(eval_windows=measured_windows)
        evaluate(self.model, dataset, plan, RankGroup(SINGLE_PROCESS))

        def measure() -> float:
            with self.timed() as seconds:
                evaluate(self.model, dataset, plan, RankGroup(SINGLE_PROCESS))
            return seconds[0]

        return median_of_repeats(measure) / measured_windows * windows, windows

    def time_checkpoint(self, folder: Path) -> tuple[float, float, int]:
        """Save checkpoints below `folder`; return seconds that training waits, seconds until durable, and bytes.

        Raises:
            VolumeUnwritable: The disk has no space.
        """
        state, plan, durable_s, sizes = self.executor.state, self.executor.plan, [], []
        tokenizer = CharTokenizer("a", False)  # required in a checkpoint; its size is negligible
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=folder) as temporary:
            writer = AsyncCheckpointWriter(Path(temporary), self.model, self.optimizer, tokenizer, plan, log_line)
            with closing(writer):
                writer.save(state)  # the first save also allocates the staging buffer, once in a run
                writer.wait()

                def measure() -> float:
                    state.step += 1
                    started = time.perf_counter()
                    with self.timed() as seconds:
                        writer.save(state)
                    writer.wait()
                    durable_s.append(time.perf_counter() - started)
                    checkpoint = Path(temporary) / checkpoint_name(state.step)
                    sizes.append(sum(path.stat().st_size for path in checkpoint.iterdir()))
                    return seconds[0]

                return median_of_repeats(measure), statistics.median(durable_s), sizes[0]


def median_of_repeats(measure: Callable[[], float]) -> float:
    """Return the median of a few measurements, or a single one if it is long."""
    seconds = [measure()]
    while len(seconds) < MAX_REPEATS and seconds[0] < REPEAT_BELOW_S:
        seconds.append(measure())
    return statistics.median(seconds)


@contextmanager
def synthetic_dataset(shape: ModelShape) -> Iterator[Dataset]:
    """Write a dataset of random tokens to a temporary folder."""
    random = np.random.default_rng(0)
    windows = max(MIN_SYNTHETIC_WINDOWS, 2 * MAX_MICRO_BATCH_TOKENS // shape.block_size)
    with tempfile.TemporaryDirectory(prefix="gpt2box-bench-") as folder:
        for split in ("train", "val"):
            count = windows * shape.block_size + 1
            random.integers(0, shape.vocab_size, count).astype("<u2").tofile(Path(folder, f"{split}.bin"))
        yield Dataset(Path(folder), {})
