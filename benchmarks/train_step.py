"""Time and memory of a training step: gpt2box beside transformers and, where a checkout is given, nanoGPT.

    python benchmarks/train_step.py                                    # 124M, micro-batch 2 × 256
    python benchmarks/train_step.py --nanogpt ../nanoGPT --model gpt2-medium --micro-batch-size 1
    python benchmarks/train_step.py --nanogpt ../nanoGPT --memory --micro-batch-size 1 --recompute selective full
    python benchmarks/train_step.py --nanogpt ../nanoGPT --device cuda --compile --model gpt2-medium --block-size 1024

Steps are taken in turns in one process, so that other load on the machine meets all alike; what counts
is the ratio of medians. Memory (--memory) is each contender's peak in a process of its own: resident size, on a GPU
what PyTorch reserved. All train the same shape on the same random tokens with AdamW as each comes: nanoGPT's own
optimizer, transformers with torch's fused one; on a CPU in float32, on a GPU under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from gpt2box.config.schema import MODEL_SHAPES
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.shape import ModelShape
from gpt2box.optim.clipped_step import ClippedStep

Step = Callable[[torch.Tensor], None]
SHAPES = {**MODEL_SHAPES, "char": {"n_layer": 6, "n_head": 6, "n_embd": 384}}
VOCABULARY = {"char": 65}
WEIGHT_DECAY, LEARNING_RATE = 0.1, 3e-4


def ours(arguments: argparse.Namespace, recompute: str) -> Step:
    """gpt2box's model, chunked loss and guarded fused step."""
    vocab_size = VOCABULARY.get(arguments.model, 50_257)
    shape = ModelShape(**SHAPES[arguments.model], block_size=1024, vocab_size=vocab_size, bias=arguments.bias)
    model = GPT2.empty(shape, 0.0, arguments.device)
    model.init_weights(0)
    model.train()
    model.activation_checkpointing = recompute
    model.loss_chunk_tokens = arguments.loss_chunk_tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    guarded = ClippedStep(optimizer, 1.0, torch.device(arguments.device))
    forward = compiled(model, arguments)

    def step(ids: torch.Tensor) -> None:
        with autocast(arguments, keeps_casts=False):
            loss = forward(ids[:, :-1], ids[:, 1:])
        guarded.before_backward(0, 0, LEARNING_RATE, loss)
        loss.backward()
        guarded(loss.detach())

    return step


def nanogpt(arguments: argparse.Namespace) -> Step:
    """nanoGPT's model and optimizer, stepped as its train.py does."""
    sys.path.insert(0, arguments.nanogpt)
    import model as theirs  # the checkout's model.py

    rows = 65 if arguments.model == "char" else 50_304
    shape = theirs.GPTConfig(**SHAPES[arguments.model], block_size=1024, vocab_size=rows, bias=arguments.bias)
    model = theirs.GPT(shape).to(arguments.device)
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, (0.9, 0.95), arguments.device)
    forward = compiled(model, arguments)

    def step(ids: torch.Tensor) -> None:
        with autocast(arguments):
            _, loss = forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers(arguments: argparse.Namespace) -> Step:
    """transformers' GPT2LMHeadModel with scaled-dot-product attention and torch's AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **SHAPES[arguments.model],
        vocab_size=VOCABULARY.get(arguments.model, 50_257),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).to(arguments.device).train()
    fused = arguments.device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused)
    forward = compiled(model, arguments)

    def step(ids: torch.Tensor) -> None:
        with autocast(arguments):
            loss = forward(ids[:, :-1], labels=ids[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compiled(model: torch.nn.Module, arguments: argparse.Namespace) -> Any:
    """The network, through the compiler if so wished."""
    return torch.compile(model, dynamic=False) if arguments.compile else model


def autocast(arguments: argparse.Namespace, keeps_casts: bool = True) -> torch.autocast:
    """bfloat16 on a GPU."""
    on_gpu = arguments.device == "cuda"
    return torch.autocast(arguments.device, torch.bfloat16, enabled=on_gpu, cache_enabled=keeps_casts)


def contender(name: str, arguments: argparse.Namespace) -> Step:
    """A contender's step, by its name in the table."""
    if name.startswith("gpt2box"):
        return ours(arguments, name.partition(", recompute ")[2] or "none")
    return nanogpt(arguments) if name == "nanoGPT" else transformers(arguments)


def tokens(arguments: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (arguments.micro_batch_size, arguments.block_size + 1)
    return torch.randint(0, VOCABULARY.get(arguments.model, 50_257), size, generator=generator).to(arguments.device)


def timings(names: list[str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step, contenders in turns, the first two rounds left out."""
    steps = {name: contender(name, arguments) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    ids = tokens(arguments)
    for turn in range(arguments.rounds + 2):
        for name, step in steps.items():
            wait(arguments)
            begun = time.perf_counter()
            for _ in range(arguments.steps):
                step(ids)
            wait(arguments)
            if turn >= 2:
                seconds[name].append((time.perf_counter() - begun) / arguments.steps)
    return seconds


def wait(arguments: argparse.Namespace) -> None:
    """Until the device has done what it was given."""
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="gpt2")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--loss-chunk-tokens", type=int, default=1024)
    parser.add_argument("--bias", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--nanogpt", help="path of a nanoGPT checkout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="all contenders by torch.compile")
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--recompute", nargs="+", default=[], choices=("selective", "full"), help="with these, too")
    parser.add_argument("--memory", action="store_true", help="peak resident memory instead of time")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    if arguments.only:
        step = contender(arguments.only, arguments)
        for _ in range(3):
            step(tokens(arguments))
        on_gpu = arguments.device == "cuda"
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print((torch.cuda.max_memory_reserved() if on_gpu else resident) / 2**20)
        return
    names = ["nanoGPT"] if arguments.nanogpt else []
    names += ["transformers", "gpt2box", *(f"gpt2box, recompute {mode}" for mode in arguments.recompute)]
    on = f"float32, {arguments.threads} threads"
    if arguments.device == "cuda":
        on = f"bfloat16 autocast, {torch.cuda.get_device_name()}{', compiled' if arguments.compile else ''}"
    print(
        f"{arguments.model}, {arguments.micro_batch_size} × {arguments.block_size} tokens, {on}, "
        f"torch {torch.__version__}"
    )
    if arguments.memory:
        figures = {}
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            figures[name] = float(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
            )
        spread = dict.fromkeys(names, "")
        unit = "MiB"
    else:
        seconds = timings(names, arguments)
        figures = {name: statistics.median(values) * 1000 for name, values in seconds.items()}
        spread = {name: f"  ({min(v) * 1000:,.1f} to {max(v) * 1000:,.1f})" for name, v in seconds.items()}
        unit = "ms"
    for name in names:
        ratio = f"{figures[name] / figures[names[0]]:.2f} × {names[0]}"
        print(f"  {name:<30} {figures[name]:>8,.1f} {unit}  {ratio}{spread[name]}")


if __name__ == "__main__":
    main()
