"""What `gpt2box bench` measures: real steps of the training loop, the loader, an evaluation, a checkpoint.

Ways to do a step share one network and one optimizer, so they can be taken in turns, and other load on the machine
meets all alike. The device is waited for around what is timed, and nowhere else.
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

MICRO_STEP_COUNTS = (1, LONG_STEP_MICRO_STEPS)  # micro-steps of the steps that are timed
TIMED_BATCHES = 20  # of the loader's that are timed
MAX_REPEATS = 3  # of an evaluation or a checkpoint, where it is short
REPEAT_BELOW_S = 5.0
OUT_OF_MEMORY = "out of memory"
MIN_SYNTHETIC_WINDOWS = 64  # at least


@dataclass
class PlanTiming:
    """A way to do the steps, and the seconds of those that were timed, by their number of micro-steps."""

    execution: ExecutionPlan
    seconds: dict[int, list[float]] = field(default_factory=lambda: {length: [] for length in MICRO_STEP_COUNTS})
    peak_bytes: int = 0  # of memory, with CUDA's own; 0 on a CPU
    fault: str = ""  # why it cannot be done here

    @property
    def done(self) -> bool:
        """Whether each length was timed at least once."""
        return not self.fault and all(self.seconds.values())

    @property
    def known(self) -> bool:
        """Whether there is something to keep: times, or that memory ran out."""
        return self.done or self.fault == OUT_OF_MEMORY

    def record(self, job: bench_records.BenchKey, free_bytes: int) -> BenchRecord:
        """For the file."""
        one, many = (statistics.median(self.seconds[length]) if self.done else 0.0 for length in MICRO_STEP_COUNTS)
        return BenchRecord(
            job=job,
            micro_batch_size=self.execution.micro_batch_size,
            activation_checkpointing=self.execution.activation_checkpointing,
            compiled=self.execution.compile,
            fits=self.done,
            free_bytes=free_bytes,
            peak_bytes=self.peak_bytes,
            one_s=one,
            many_s=many,
            when=time.strftime("%Y-%m-%d"),
            gpt2box=__version__,
        )

    def words(self) -> str:
        """As settings."""
        return f"{self.execution.describe()}, {'compiled' if self.execution.compile else 'not compiled'}"


class StepTimer:
    """One network, its optimizer and a dataset, to take steps with and time them."""

    def __init__(self, plan: RunPlan, dataset: Dataset) -> None:
        self.device = torch.device(plan.derived.device)
        self.before_bytes = peak_memory_bytes(self.device)  # on a CPU: Python and PyTorch
        self.model = make_empty_model(plan)
        self.model.init_weights(plan.config.seed)
        self.model.train()
        self.optimizer = make_optimizer(self.model, plan)
        state = TrainState(optimizer_steps=1)
        self.steps = StepExecutor(plan, self.model, self.optimizer, dataset, state)

    def turn(self, way: PlanTiming, steps: int) -> None:
        """Time `steps` more steps of each length; running out of memory is a result."""
        try:
            self._turn(way, steps)
            return
        except torch.cuda.OutOfMemoryError:
            way.fault = OUT_OF_MEMORY
        except Exception as error:
            if not way.execution.compile:
                raise
            lines = str(error).splitlines() or [""]  # the compiler's errors are of many kinds
            way.fault = f"not compiled: {type(error).__name__} {lines[0]}"
        self.give_back()  # outside: while an exception is handled, it holds on to the step's tensors

    def _turn(self, way: PlanTiming, steps: int) -> None:
        self.use(way)
        with closing(self.steps):
            for number in range(-1 if any(way.seconds.values()) else -2, steps):  # the first are to warm up
                for length in MICRO_STEP_COUNTS:
                    self.steps.use_plan(self.steps.plan.with_execution(grad_accum_steps=length), keep_batches=True)
                    with self.timed() as seconds:
                        self.steps.take()
                    if number >= 0:
                        way.seconds[length] += seconds
        if self.device.type == "cuda":
            way.peak_bytes = max(way.peak_bytes, torch.cuda.max_memory_reserved(self.device) + CUDA_CONTEXT_BYTES)

    def use(self, way: PlanTiming) -> None:
        """Take the next steps with another execution plan."""
        self.give_back()
        self.steps.use_plan(replace(self.steps.plan, execution=way.execution))

    @contextmanager
    def timed(self) -> Iterator[list[float]]:
        """The seconds of a block, with all that the device has to do for it."""
        seconds: list[float] = []
        self.wait()
        begun = time.perf_counter()
        yield seconds
        self.wait()
        seconds.append(time.perf_counter() - begun)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def give_back(self) -> None:
        """As if nothing had been computed yet."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def loader_s(self) -> float:
        """Seconds in which a micro-batch is read, with nothing else to do."""
        with closing(self.steps.open_batches()) as batches:
            for _ in range(PREFETCH + 1):
                next(batches)
            begun = time.perf_counter()
            for _ in range(TIMED_BATCHES):
                next(batches)
            return (time.perf_counter() - begun) / TIMED_BATCHES

    def evaluation_s(self) -> tuple[float, int]:
        """Seconds of an evaluation as it is set, from a few of its windows, and how many it has."""
        plan, dataset = self.steps.plan, self.steps.dataset
        windows = plan.config.eval_windows
        if dataset.manifest or not windows:
            windows = len(val_window_starts(dataset.tokens("val"), plan.shape.block_size, plan.config.eval_windows))
        few = min(windows, 2 * plan.eval_batch_size)
        plan = plan.with_settings(eval_windows=few)
        evaluate(self.model, dataset, plan, RankGroup(SINGLE_PROCESS))

        def once() -> float:
            with self.timed() as seconds:
                evaluate(self.model, dataset, plan, RankGroup(SINGLE_PROCESS))
            return seconds[0]

        return median_of_repeats(once) / few * windows, windows

    def checkpoint_s(self, folder: Path) -> tuple[float, float, int]:
        """Of a checkpoint on the disk of `folder`: seconds for which training waits, until it is whole, and its bytes.

        Raises:
            VolumeUnwritable: no space.
        """
        state, plan, durable_s, sizes = self.steps.state, self.steps.plan, [], []
        tokenizer = CharTokenizer("a", False)  # a checkpoint has one; its size is not what takes time
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=folder) as temporary:
            saver = AsyncCheckpointWriter(Path(temporary), self.model, self.optimizer, tokenizer, plan, log_line)
            with closing(saver):
                saver.save(state)  # which also makes room for the copy, once in a run
                saver.wait()

                def once() -> float:
                    state.step += 1
                    begun = time.perf_counter()
                    with self.timed() as seconds:
                        saver.save(state)
                    saver.wait()
                    durable_s.append(time.perf_counter() - begun)
                    where = Path(temporary) / checkpoint_name(state.step)
                    sizes.append(sum(path.stat().st_size for path in where.iterdir()))
                    return seconds[0]

                return median_of_repeats(once), statistics.median(durable_s), sizes[0]


def median_of_repeats(once: Callable[[], float]) -> float:
    """The median of a few times; what takes long is done once."""
    seconds = [once()]
    while len(seconds) < MAX_REPEATS and seconds[0] < REPEAT_BELOW_S:
        seconds.append(once())
    return statistics.median(seconds)


@contextmanager
def synthetic_dataset(shape: ModelShape) -> Iterator[Dataset]:
    """A dataset of random tokens, in the system's folder for what is temporary."""
    random = np.random.default_rng(0)
    windows = max(MIN_SYNTHETIC_WINDOWS, 2 * MAX_MICRO_BATCH_TOKENS // shape.block_size)
    with tempfile.TemporaryDirectory(prefix="gpt2box-bench-") as folder:
        for split in ("train", "val"):
            count = windows * shape.block_size + 1
            random.integers(0, shape.vocab_size, count).astype("<u2").tofile(Path(folder, f"{split}.bin"))
        yield Dataset(Path(folder), {})
