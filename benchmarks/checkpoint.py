"""Time to save and to load a checkpoint of GPT-2 Medium with AdamW, compared with torch.save and torch.load.

    python benchmarks/checkpoint.py [--model gpt2-medium] [--rounds 3] [--folder /tmp]
    python benchmarks/checkpoint.py --device cuda              the same with a GPU
    python benchmarks/checkpoint.py --beside [--rounds 5]      how much the writer thread slows concurrent steps

Contenders take turns; the figures are medians of all rounds. Saving: torch.save (without fsync, as programs use it)
against the copy that training waits for and the thread that writes, syncs, verifies and renames. Loading: torch.load
against restoring into existing tensors and verifying the checksums. Medium needs 9 GB of memory and of disk.

--beside trains a network of 6 layers × 512 on the CPU: each round takes some steps alone, then steps for as long as
checkpoints are being written, and compares their medians. On a CPU the writer competes with the step for cores; on a
GPU it does not.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gpt2box.checkpoint import retention
from gpt2box.checkpoint.async_writer import StagingBuffer
from gpt2box.checkpoint.loader import restore_checkpoint
from gpt2box.checkpoint.metadata import TrainState, load_verified_state
from gpt2box.checkpoint.writer import (
    TensorFiles,
    checkpoint_bytes,
    checkpoint_config,
    checkpoint_tensors,
    publish_checkpoint,
)
from gpt2box.config.schema import MODEL_SHAPES
from gpt2box.data.tokenizer import CharTokenizer
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.shape import ModelShape
from gpt2box.optim.clipped_step import ClippedStep

CONCURRENT_SHAPE = ModelShape(n_layer=6, n_head=8, n_embd=512, block_size=128, vocab_size=50_257)  # 45M parameters
STEPS_ALONE, SAVES = 12, 4  # of each round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-medium", choices=MODEL_SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--beside", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder / "gpt2box-benchmark-checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        if arguments.beside:
            measure_concurrent_steps(arguments.rounds, folder)
        else:
            shape = ModelShape(**MODEL_SHAPES[arguments.model], block_size=1024, vocab_size=50_257)
            measure_save_and_load(shape, arguments.device, arguments.rounds, folder)
    finally:
        shutil.rmtree(folder)


def measure_save_and_load(shape: ModelShape, device: str, rounds: int, folder: Path) -> None:
    """Time all contenders in turns and print the medians."""
    model, optimizer = make_model(shape, device)
    state = TrainState(step=1, optimizer_steps=1)
    plain, checkpoints = folder / "plain.pt", folder / "checkpoints"
    checkpoint = checkpoints / retention.checkpoint_name(state.step)
    timer = Timer()
    save_rounds(model, optimizer, state, rounds, timer, plain, checkpoint)
    for _ in range(rounds):
        timer.time("torch.load", lambda: torch.load(plain, weights_only=True, map_location=device))
        timer.time("restore", lambda: restore_checkpoint(checkpoint, model, optimizer, state))
        timer.time("checksums", lambda: load_verified_state(checkpoint))
    gigabytes = checkpoint_bytes(model, optimizer, state) / 1e9
    print(f"{gigabytes:.2f} GB, {device}, {torch.get_num_threads()} threads, medians of {rounds}")
    for name, base in {
        "copy": "torch.save",
        "thread": "torch.save",
        "restore": "torch.load",
        "checksums": "torch.load",
    }.items():
        seconds, reference = timer.median(name), timer.median(base)
        print(f"{name:14} {seconds:6.2f} s = {seconds / reference:.3f} of {base} ({reference:.2f} s)")


def make_model(shape: ModelShape, device: str = "cpu") -> tuple[GPT2, torch.optim.AdamW]:
    """Make a network and its optimizer state."""
    model = GPT2.empty(shape, 0.0, device)
    model.init_weights(1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        moments = {key: torch.full_like(parameter, 0.01) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.ones((), device=device), **moments}
    return model, optimizer


def measure_concurrent_steps(rounds: int, folder: Path) -> None:
    """Time steps alone and during saves, in turns."""
    model, optimizer = make_model(CONCURRENT_SHAPE)
    tokenizer, state = CharTokenizer("ab", False), TrainState(step=1, optimizer_steps=1)
    files, config = checkpoint_tensors(model, optimizer, state), checkpoint_config(model, tokenizer)
    staging_buffer, update = StagingBuffer(files, pin=False), ClippedStep(optimizer, 1.0, torch.device("cpu"))
    batch = torch.randint(0, CONCURRENT_SHAPE.vocab_size, (1, CONCURRENT_SHAPE.block_size + 1))
    checkpoint = folder / "checkpoints"

    def step() -> tuple[float, float]:
        start, cpu_start = time.perf_counter(), time.thread_time()
        loss = model(batch[:, :-1], batch[:, 1:], 1.0)
        update.before_backward(1, 0, 1e-5, loss)
        loss.backward()
        update(loss.detach())
        return time.perf_counter() - start, time.thread_time() - cpu_start

    def save(copies: TensorFiles) -> None:
        start, cpu_start = time.perf_counter(), time.thread_time()
        for _ in range(SAVES):
            shutil.rmtree(checkpoint, ignore_errors=True)
            publish_checkpoint(checkpoint, copies, config, state, tokenizer)
        saves.append(((time.perf_counter() - start) / SAVES, (time.thread_time() - cpu_start) / SAVES))

    ratios: list[tuple[float, float]] = []
    saves: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        alone = [step() for _ in range(STEPS_ALONE)]
        writer, concurrent = threading.Thread(target=save, args=(staging_buffer.copy(files),)), []
        writer.start()
        while writer.is_alive():
            concurrent.append(step())
        if number == 0:  # warm-up
            saves.clear()
            continue
        usual, slowed = medians(alone), medians(concurrent[:-1] or concurrent)  # the last step ended alone
        ratios.append((slowed[0] / usual[0], slowed[1] / usual[1]))
        print(f"  {usual[0]:.2f} s per step alone, {slowed[0]:.2f} s during saves, {len(concurrent)} steps", flush=True)
    gigabytes = checkpoint_bytes(model, optimizer, state) / 1e9
    print(f"{gigabytes:.2f} GB, {torch.get_num_threads()} threads, {rounds} rounds: time, processor time of its thread")
    for name, rows in {"step during saves / alone": ratios, "seconds per checkpoint": saves}.items():
        columns = ([row[column] for row in rows] for column in (0, 1))
        texts = (f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in columns)
        print(f"{name:28}", *texts, sep="  ")


def medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the median of each column."""
    return statistics.median(each[0] for each in times), statistics.median(each[1] for each in times)


def save_rounds(
    model: GPT2,
    optimizer: torch.optim.AdamW,
    state: TrainState,
    rounds: int,
    timer: Timer,
    plain: Path,
    checkpoint: Path,
) -> None:
    """Time saving in both ways. The staging buffer is freed on return."""
    tokenizer = CharTokenizer("ab", False)
    files, config = checkpoint_tensors(model, optimizer, state), checkpoint_config(model, tokenizer)
    staging_buffer = StagingBuffer(files, pin=next(model.parameters()).is_cuda)
    copies = staging_buffer.copy(files)
    for _ in range(rounds):
        plain.unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)
        timer.time("torch.save", lambda: torch.save([model.state_dict(), optimizer.state_dict()], plain))
        timer.time("copy", lambda: staging_buffer.copy(files))
        timer.time("thread", lambda: publish_checkpoint(checkpoint.parent, copies, config, state, tokenizer))


class Timer:
    """Measured seconds by name."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def time(self, name: str, function: Callable[[], object]) -> None:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.setdefault(name, []).append(time.perf_counter() - start)
        print(f"  {name}: {self.times[name][-1]:.2f} s", flush=True)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])


if __name__ == "__main__":
    main()
