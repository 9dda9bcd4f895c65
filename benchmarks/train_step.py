"""Time and memory of a training step: gpt2box beside transformers and, where a checkout is given, nanoGPT.

    python benchmarks/train_step.py                                    # 124M, micro-batch 2 × 256
    python benchmarks/train_step.py --nanogpt ../nanoGPT --model gpt2-medium --micro-batch-size 1
    python benchmarks/train_step.py --nanogpt ../nanoGPT --memory --micro-batch-size 1 --block-size 1024

Steps are taken in turns in one process, so that other load on the machine meets all alike; what counts
is the ratio of medians. Memory (--memory) is each contender's peak resident size in a process of its own.
All train the same shape on the same random tokens in float32 with AdamW as each comes: nanoGPT's own
optimizer, transformers with torch's.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from gpt2box.config import MODEL_SHAPES
from gpt2box.model.gpt2 import GPT2
from gpt2box.planning.shape import ModelShape
from gpt2box.training.optim import GuardedStep

Step = Callable[[torch.Tensor], None]
SHAPES = {**MODEL_SHAPES, "char": {"n_layer": 6, "n_head": 6, "n_embd": 384}}
VOCABULARY = {"char": 65}
WEIGHT_DECAY, LEARNING_RATE = 0.1, 3e-4


def ours(arguments: argparse.Namespace, recompute: str) -> Step:
    """gpt2box's model, chunked loss and guarded fused step."""
    vocab_size = VOCABULARY.get(arguments.model, 50_257)
    shape = ModelShape(**SHAPES[arguments.model], block_size=1024, vocab_size=vocab_size, bias=arguments.bias)
    model = GPT2.empty(shape, 0.0, "cpu")
    model.initialise(0)
    model.train()
    model.activation_checkpointing = recompute
    model.loss_chunk_tokens = arguments.loss_chunk_tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    guarded = GuardedStep(optimizer, 1.0, torch.device("cpu"))

    def step(ids: torch.Tensor) -> None:
        loss = model(ids[:, :-1], ids[:, 1:])
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
    model = theirs.GPT(shape)
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, (0.9, 0.95), "cpu")

    def step(ids: torch.Tensor) -> None:
        _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
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
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step(ids: torch.Tensor) -> None:
        model(ids[:, :-1], labels=ids[:, :-1]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def contender(name: str, arguments: argparse.Namespace) -> Step:
    """A contender's step, by its name in the table."""
    if name.startswith("gpt2box"):
        return ours(arguments, name.partition(", recompute ")[2] or "none")
    return nanogpt(arguments) if name == "nanoGPT" else transformers(arguments)


def tokens(arguments: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (arguments.micro_batch_size, arguments.block_size + 1)
    return torch.randint(0, VOCABULARY.get(arguments.model, 50_257), size, generator=generator)


def timings(names: list[str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step, contenders in turns, the first two rounds left out."""
    steps = {name: contender(name, arguments) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.rounds + 2):
        for name, step in steps.items():
            ids = tokens(arguments)
            begun = time.perf_counter()
            step(ids)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


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
    parser.add_argument("--memory", action="store_true", help="peak resident memory instead of time")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    if arguments.only:
        step = contender(arguments.only, arguments)
        for _ in range(3):
            step(tokens(arguments))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    names = ["nanoGPT"] if arguments.nanogpt else []
    names += ["transformers", "gpt2box"]
    print(
        f"{arguments.model}, {arguments.micro_batch_size} × {arguments.block_size} tokens, float32, "
        f"{arguments.threads} threads, torch {torch.__version__}"
    )
    if arguments.memory:
        names += ["gpt2box, recompute selective", "gpt2box, recompute full"]
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
        spread = {name: f"  ({min(v) * 1000:,.0f} to {max(v) * 1000:,.0f})" for name, v in seconds.items()}
        unit = "ms"
    for name in names:
        ratio = f"{figures[name] / figures[names[0]]:.2f} × {names[0]}"
        print(f"  {name:<30} {figures[name]:>8,.0f} {unit}  {ratio}{spread[name]}")


if __name__ == "__main__":
    main()
