"""Sampling speed, compared with transformers' `generate`, nanoGPT's loop and the bandwidth of the memory.

    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    python benchmarks/sample.py --nanogpt /tmp/nanoGPT [--device cuda]

Random weights of GPT-2 Medium's shape, greedy sampling, contenders in turns, medians. A token reads every weight once,
so the memory limits the speed: the bandwidth of matrix-vector products (float32 on a CPU, float16 on a GPU), measured
in the same run, divided by the bytes of all weights.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpt2box.config.schema import MODEL_SHAPES
from gpt2box.model.decoder import PACKERS, Decoder
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import hf_state_dict
from gpt2box.model.sampling import SamplingParams, generate_batch
from gpt2box.model.shape import ModelShape

BYTES = {"float32": 4, "float16": 2, "int8": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--model", default="gpt2-medium", choices=MODEL_SHAPES)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    on_gpu = arguments.device == "cuda"
    formats = [*PACKERS][:2] if on_gpu else [*PACKERS]
    shape = ModelShape(**MODEL_SHAPES[arguments.model], block_size=1024, vocab_size=50_257, bias=True)
    model = GPT2(shape).to(arguments.device).eval()
    model.init_weights(1)
    contenders: dict[str, Callable[[torch.Tensor, int], Any]] = {"transformers": make_transformers(model)}
    if on_gpu:
        contenders["transformers float16"] = make_transformers(model, torch.float16)
    if arguments.nanogpt:
        contenders["nanoGPT"] = make_nanogpt(arguments.nanogpt, shape, arguments.device)
    for weights in formats:
        contenders[f"gpt2box {weights}"] = make_gpt2box(Decoder(copy.deepcopy(model), weights))
    bandwidth = (
        dict.fromkeys(formats, measure_gpu_bandwidth())
        if on_gpu
        else {weights: measure_bandwidth(weights) for weights in formats}
    )
    print(
        "matrix-vector products:", ", ".join(f"{weights} {rate / 1e9:.1f} GB/s" for weights, rate in bandwidth.items())
    )
    for batch in arguments.batches:
        ids = torch.randint(0, shape.vocab_size, (batch, arguments.prompt_tokens), device=arguments.device)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for round_ in range(arguments.rounds + on_gpu):
            for name, run in contenders.items():
                count = 4 if name == "nanoGPT" else arguments.new_tokens  # nanoGPT is slow
                start = time.perf_counter()
                run(ids, count)
                if round_ or not on_gpu:  # the first round on a GPU is warm-up
                    rates[name].append(batch * count / (time.perf_counter() - start))
        print(f"batch {batch}: tokens/s, × transformers, share of the limit")
        theirs = statistics.median(rates["transformers"])
        for name, measured in rates.items():
            rate = statistics.median(measured)
            weights = name.rpartition(" ")[2] if " " in name else "float32"
            limit = bandwidth["float32"] / (BYTES[weights] * shape.parameters)  # tokens per second
            share = f"{rate / limit:.0%}" if batch == 1 else ""
            print(f"  {name:20} {rate:7.2f}  {rate / theirs:5.2f}  {share}")


def make_transformers(model: GPT2, dtype: torch.dtype = torch.float32) -> Callable[[torch.Tensor, int], Any]:
    """Make transformers' GPT-2 with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = model.shape
    config = GPT2Config(n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.load_state_dict({**hf_state_dict(model), "lm_head.weight": model.wte.weight[: shape.vocab_size]})
    theirs = theirs.to(model.wte.weight.device, dtype)

    def run(ids: torch.Tensor, count: int) -> None:
        theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=50_256,
        )

    return run


def make_nanogpt(folder: Path, shape: ModelShape, device: str) -> Callable[[torch.Tensor, int], Any]:
    """Make nanoGPT's model with random weights."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd}
    theirs = module.GPT(module.GPTConfig(**sizes, block_size=1024, vocab_size=50_257, bias=True, dropout=0.0))
    theirs = theirs.to(device).eval()
    return lambda ids, count: theirs.generate(ids, count, top_k=1)


def make_gpt2box(decoder: Decoder) -> Callable[[torch.Tensor, int], Any]:
    """Make gpt2box's generation loop."""

    def run(ids: torch.Tensor, count: int) -> None:
        for _ in generate_batch(decoder, ids.tolist(), count, SamplingParams(temperature=0), [0] * len(ids)):
            pass

    return run


def measure_gpu_bandwidth() -> float:
    """Measure the bytes per second of matrix-vector products with 1.6 GB of float16 matrices."""
    layers = [torch.randn(1024, 4096, device="cuda", dtype=torch.float16) for _ in range(200)]
    x, best = torch.randn(1, 1024, device="cuda", dtype=torch.float16), 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for _ in range(15):
        start.record()
        for layer in layers:
            x @ layer
        end.record()
        torch.cuda.synchronize()
        best = max(best, len(layers) * 1024 * 4096 * 2 / (start.elapsed_time(end) / 1000))
    return best


def measure_bandwidth(weights: str) -> float:
    """Measure the bytes per second of matrix-vector products on the CPU, with more matrices than its caches hold."""
    layers = [torch.nn.Linear(1024, 4096, bias=False) for _ in range(24)]
    size = len(layers) * 1024 * 4096 * BYTES[weights]
    x, best = torch.randn(1, 1024), 0.0
    with torch.inference_mode():
        products = [PACKERS[weights](layer) for layer in layers]
        for _ in range(15):
            start = time.perf_counter()
            for product in products:
                product(x)
            best = max(best, size / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
