"""A checkpoint of GPT-2 Medium with AdamW: how long training waits for it, and how long reading it back takes.

    python benchmarks/checkpoint.py [--model gpt2-medium] [--rounds 3] [--folder /tmp]
    python benchmarks/checkpoint.py --device cuda              the same from and to a GPU
    python benchmarks/checkpoint.py --beside [--rounds 5]    what the thread that writes costs the steps beside it

Contenders in turns, medians of all rounds. First torch.save (without fsync, as programs use it), against the wait for
the copy and what the thread does then until all is durable, read back and named. Then torch.load of the same tensors,
against reading back into the tensors that are there, and the checksums that are compared before. Medium needs 9 GB of
memory and as much disk.

With --beside a network of 6 layers × 512 is trained on the CPU: in each round some steps with nothing else, then steps
for as long as checkpoints are being written; the ratio of the round's medians. On a CPU the writer wants the cores that
the step wants, which on a GPU it does not.
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

BESIDE = ModelShape(n_layer=6, n_head=8, n_embd=512, block_size=128, vocab_size=50_257)  # 45M parameters
ALONE, SAVES = 12, 4  # of a round: steps with nothing beside them, and checkpoints that are written one after the other


def main() -> None:
    """Measure and print."""
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
            measure_beside(arguments.rounds, folder)
        else:
            shape = ModelShape(**MODEL_SHAPES[arguments.model], block_size=1024, vocab_size=50_257)
            measure(shape, arguments.device, arguments.rounds, folder)
    finally:
        shutil.rmtree(folder)


def measure(shape: ModelShape, device: str, rounds: int, folder: Path) -> None:
    """All contenders, `rounds` times in turns."""
    model, optimizer = made(shape, device)
    state = TrainState(step=1, optimizer_steps=1)
    plain, checkpoints = folder / "plain.pt", folder / "checkpoints"
    whole = checkpoints / retention.checkpoint_name(state.step)
    watch = Watch()
    save_rounds(model, optimizer, state, rounds, watch, plain, whole)
    for _ in range(rounds):
        watch.time("torch.load", lambda: torch.load(plain, weights_only=True, map_location=device))
        watch.time("reading back", lambda: restore_checkpoint(whole, model, optimizer, state))
        watch.time("checksums", lambda: load_verified_state(whole))
    gigabytes = checkpoint_bytes(model, optimizer, state) / 1e9
    print(f"{gigabytes:.2f} GB, {device}, {torch.get_num_threads()} threads, medians of {rounds}")
    for name, base in {
        "the wait": "torch.save",
        "the thread": "torch.save",
        "reading back": "torch.load",
        "checksums": "torch.load",
    }.items():
        mine, its = watch.median(name), watch.median(base)
        print(f"{name:14} {mine:6.2f} s = {mine / its:.3f} of {base} ({its:.2f} s)")


def made(shape: ModelShape, device: str = "cpu") -> tuple[GPT2, torch.optim.AdamW]:
    """A network and its averages."""
    model = GPT2.empty(shape, 0.0, device)
    model.init_weights(1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        averages = {key: torch.full_like(parameter, 0.01) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.ones((), device=device), **averages}
    return model, optimizer


def measure_beside(rounds: int, folder: Path) -> None:
    """Steps with nothing else and beside checkpoints that are being written, in turns."""
    model, optimizer = made(BESIDE)
    words, state = CharTokenizer("ab", False), TrainState(step=1, optimizer_steps=1)
    files, config = checkpoint_tensors(model, optimizer, state), checkpoint_config(model, words)
    snapshot, update = StagingBuffer(files, pin=False), ClippedStep(optimizer, 1.0, torch.device("cpu"))
    batch = torch.randint(0, BESIDE.vocab_size, (1, BESIDE.block_size + 1))
    whole = folder / "checkpoints"

    def step() -> tuple[float, float]:
        begun, worked = time.perf_counter(), time.thread_time()
        loss = model(batch[:, :-1], batch[:, 1:], 1.0)
        update.before_backward(1, 0, 1e-5, loss)
        loss.backward()
        update(loss.detach())
        return time.perf_counter() - begun, time.thread_time() - worked

    def save(copies: TensorFiles) -> None:
        begun, worked = time.perf_counter(), time.thread_time()
        for _ in range(SAVES):
            shutil.rmtree(whole, ignore_errors=True)
            publish_checkpoint(whole, copies, config, state, words)
        writing.append(((time.perf_counter() - begun) / SAVES, (time.thread_time() - worked) / SAVES))

    ratios: list[tuple[float, float]] = []
    writing: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        alone = [step() for _ in range(ALONE)]
        writer, beside = threading.Thread(target=save, args=(snapshot.copy(files),)), []
        writer.start()
        while writer.is_alive():
            beside.append(step())
        if number == 0:  # in which memory and the folder's pages are new
            writing.clear()
            continue
        usual, slowed = middle(alone), middle(beside[:-1] or beside)  # the last ran on alone
        ratios.append((slowed[0] / usual[0], slowed[1] / usual[1]))
        print(f"  {usual[0]:.2f} s a step, {slowed[0]:.2f} s beside, {len(beside)} steps", flush=True)
    gigabytes = checkpoint_bytes(model, optimizer, state) / 1e9
    print(
        f"{gigabytes:.2f} GB, {torch.get_num_threads()} threads, {rounds} rounds: time, and its thread's processor time"
    )
    for name, found in {"a step beside, of one alone": ratios, "seconds a checkpoint": writing}.items():
        time_, work = ([each[column] for each in found] for column in (0, 1))
        shown = (f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in (time_, work))
        print(f"{name:28}", *shown, sep="  ")


def middle(times: list[tuple[float, float]]) -> tuple[float, float]:
    """The median of each column."""
    return statistics.median(each[0] for each in times), statistics.median(each[1] for each in times)


def save_rounds(
    model: GPT2, optimizer: torch.optim.AdamW, state: TrainState, rounds: int, watch: Watch, plain: Path, whole: Path
) -> None:
    """Saving, in both ways; the copy's memory is given back at the end."""
    words = CharTokenizer("ab", False)
    files, config = checkpoint_tensors(model, optimizer, state), checkpoint_config(model, words)
    snapshot = StagingBuffer(files, pin=next(model.parameters()).is_cuda)
    copies = snapshot.copy(files)
    for _ in range(rounds):
        plain.unlink(missing_ok=True)
        shutil.rmtree(whole, ignore_errors=True)
        watch.time("torch.save", lambda: torch.save([model.state_dict(), optimizer.state_dict()], plain))
        watch.time("the wait", lambda: snapshot.copy(files))
        watch.time("the thread", lambda: publish_checkpoint(whole.parent, copies, config, state, words))


class Watch:
    """Seconds by name."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def time(self, name: str, act: Callable[[], object]) -> None:
        begun = time.perf_counter()
        act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.setdefault(name, []).append(time.perf_counter() - begun)
        print(f"  {name}: {self.times[name][-1]:.2f} s", flush=True)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])


if __name__ == "__main__":
    main()
