"""Time and memory of a training step: gpt2box, transformers and, given a checkout, nanoGPT.

    python benchmarks/train_step.py                                    # 124M, micro-batch 2 × 256
    python benchmarks/train_step.py --nanogpt ../nanoGPT --model gpt2-medium --micro-batch-size 1
    python benchmarks/train_step.py --nanogpt ../nanoGPT --memory --micro-batch-size 1 --recompute selective full
    python benchmarks/train_step.py --nanogpt ../nanoGPT --device cuda --compile --model gpt2-medium --block-size 1024

Contenders take turns in one process, so that other load on the machine affects all equally; the result is the ratio of
medians. Memory (--memory) is each contender's peak in a process of its own: resident size, on a GPU what PyTorch
reserved. All train the same shape on the same random tokens: float32 on a CPU, bfloat16 autocast on a GPU. nanoGPT uses
the optimizer it configures, the others PyTorch's AdamW.
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


def gpt2box(arguments: argparse.Namespace, activation_checkpointing: str) -> Step:
    """Make a step of gpt2box: chunked loss, clipped step with the fused AdamW."""
    vocab_size = VOCABULARY.get(arguments.model, 50_257)
    shape = ModelShape(**SHAPES[arguments.model], block_size=1024, vocab_size=vocab_size, bias=arguments.bias)
    model = GPT2.empty(shape, 0.0, arguments.device)
    model.init_weights(0)
    model.train()
    model.activation_checkpointing = activation_checkpointing
    model.loss_chunk_tokens = arguments.loss_chunk_tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    optimizer_step = ClippedStep(optimizer, 1.0, torch.device(arguments.device))
    forward = compile_if_asked(model, arguments)

    def step(ids: torch.Tensor) -> None:
        with autocast(arguments, cache_casts=False):
            loss = forward(ids[:, :-1], ids[:, 1:])
        optimizer_step.before_backward(0, 0, LEARNING_RATE, loss)
        loss.backward()
        optimizer_step(loss.detach())

    return step


def nanogpt(arguments: argparse.Namespace) -> Step:
    """Make a step of nanoGPT as its train.py takes it."""
    sys.path.insert(0, arguments.nanogpt)
    import model as theirs  # the checkout's model.py

    rows = 65 if arguments.model == "char" else 50_304
    shape = theirs.GPTConfig(**SHAPES[arguments.model], block_size=1024, vocab_size=rows, bias=arguments.bias)
    model = theirs.GPT(shape).to(arguments.device)
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, (0.9, 0.95), arguments.device)
    forward = compile_if_asked(model, arguments)

    def step(ids: torch.Tensor) -> None:
        with autocast(arguments):
            _, loss = forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers(arguments: argparse.Namespace) -> Step:
    """Make a step of transformers' GPT2LMHeadModel with scaled-dot-product attention and PyTorch's AdamW."""
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
    forward = compile_if_asked(model, arguments)

    def step(ids: torch.Tensor) -> None:
        with autocast(arguments):
            loss = forward(ids[:, :-1], labels=ids[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compile_if_asked(model: torch.nn.Module, arguments: argparse.Namespace) -> Any:
    """Compile the network if --compile is given."""
    return torch.compile(model, dynamic=False) if arguments.compile else model


def autocast(arguments: argparse.Namespace, cache_casts: bool = True) -> torch.autocast:
    """Autocast to bfloat16 on a GPU."""
    on_gpu = arguments.device == "cuda"
    return torch.autocast(arguments.device, torch.bfloat16, enabled=on_gpu, cache_enabled=cache_casts)


def make_contender(name: str, arguments: argparse.Namespace) -> Step:
    """Make a contender's step from its name in the table."""
    if name.startswith("gpt2box"):
        return gpt2box(arguments, name.partition(", recompute ")[2] or "none")
    return nanogpt(arguments) if name == "nanoGPT" else transformers(arguments)


def random_tokens(arguments: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (arguments.micro_batch_size, arguments.block_size + 1)
    return torch.randint(0, VOCABULARY.get(arguments.model, 50_257), size, generator=generator).to(arguments.device)


def time_steps(names: list[str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Measure the seconds per step, contenders in turns, without the first two rounds."""
    steps = {name: make_contender(name, arguments) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    ids = random_tokens(arguments)
    for round_ in range(arguments.rounds + 2):
        for name, step in steps.items():
            synchronize(arguments)
            start = time.perf_counter()
            for _ in range(arguments.steps):
                step(ids)
            synchronize(arguments)
            if round_ >= 2:
                seconds[name].append((time.perf_counter() - start) / arguments.steps)
    return seconds


def synchronize(arguments: argparse.Namespace) -> None:
    """Wait for the GPU."""
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
    parser.add_argument("--compile", action="store_true", help="compile all contenders with torch.compile")
    parser.add_argument("--steps", type=int, default=1, help="steps per turn")
    parser.add_argument(
        "--recompute",
        nargs="+",
        default=[],
        choices=("selective", "full"),
        help="also measure these modes of activation checkpointing",
    )
    parser.add_argument("--memory", action="store_true", help="peak resident memory instead of time")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    if arguments.only:
        step = make_contender(arguments.only, arguments)
        for _ in range(3):
            step(random_tokens(arguments))
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
        seconds = time_steps(names, arguments)
        figures = {name: statistics.median(values) * 1000 for name, values in seconds.items()}
        spread = {name: f"  ({min(v) * 1000:,.1f} to {max(v) * 1000:,.1f})" for name, v in seconds.items()}
        unit = "ms"
    for name in names:
        ratio = f"{figures[name] / figures[names[0]]:.2f} × {names[0]}"
        print(f"  {name:<30} {figures[name]:>8,.1f} {unit}  {ratio}{spread[name]}")


if __name__ == "__main__":
    main()
