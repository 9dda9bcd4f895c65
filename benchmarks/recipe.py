"""Tokens to a loss: Muon's recipe against AdamW, tuned as carefully, and against nanoGPT's recipe as published.

    python benchmarks/recipe.py [--sizes small medium] [--seeds 1 2 3] [--results FILE] [--plot docs/recipe.png]
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from gpt2box import config_file
from gpt2box.data.batches import TrainWindows, inputs_and_targets, micro_batches
from gpt2box.data.tokens import Dataset, open_dataset
from gpt2box.model.gpt2 import GPT2
from gpt2box.paths import dataset_dir
from gpt2box.planning.choose import Place, options
from gpt2box.planning.plan import RunPlan, make_plan
from gpt2box.planning.shape import ModelShape
from gpt2box.training.optim import learning_rate, make_optimizer, make_update
from gpt2box.training.validation import evaluate


def planned(dataset: Dataset, settings: dict[str, Any]) -> RunPlan:
    flags = {"dataset": "x", "activation_checkpointing": "none", "eval_windows": 600, "device": "cpu", **settings}
    config = config_file.load(None, {key: str(value) for key, value in flags.items()})[0]
    shape = ModelShape(
        **config.shape(), block_size=config.block_size, vocab_size=dataset.tokenizer.vocab_size, bias=config.bias
    )
    place = Place("this CPU", 1 << 62, None, "float32", on_gpu=False, compiled=False)
    way = options(config, shape, place)[0]
    return make_plan(config, shape, dataset.tokens("train"), "cpu", "float32", False, way)


def trained(dataset: Dataset, plan: RunPlan, evaluations: int) -> tuple[list[tuple[int, float]], float]:
    """(tokens, val_loss) along the way, and seconds of training."""
    model = GPT2(plan.shape, plan.dropout)
    model.initialise(plan.seed)
    model.loss_chunk_tokens = plan.loss_chunk_tokens
    optimizer = make_optimizer(model, plan)
    update = make_update(optimizer, plan)
    windows = TrainWindows(dataset.tokens("train"), plan.shape.block_size, plan.seed)
    path = dataset.folder / "train.bin"
    points, seconds = [], 0.0
    with closing(micro_batches(path, windows, plan.shape.vocab_size, 0, plan.micro_batch_size, False)) as batches:
        for step in range(plan.max_steps):
            begun = time.thread_time()
            total = torch.zeros(())
            for micro_step in range(plan.grad_accum_steps):
                inputs, targets = inputs_and_targets(next(batches))
                loss = model(inputs, targets, 1.0 / plan.grad_accum_steps)
                update.before_backward(step, micro_step, learning_rate(step, plan), loss)
                loss.backward()
                total += loss.detach()
            update(total)
            seconds += time.thread_time() - begun
            if (step + 1) % max(plan.max_steps // evaluations, 1) == 0 or step + 1 == plan.max_steps:
                points.append(((step + 1) * plan.tokens_per_step, evaluate(model, dataset, plan)[0]))
    return points, seconds


def measure(dataset: Dataset, results: Path, label: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    key = {**label, "settings": {k: settings[k] for k in sorted(settings)}}
    if results.exists():
        for line in results.read_text().splitlines():
            row = json.loads(line)
            if row["key"] == key:
                return row
    plan = planned(dataset, settings)
    points, seconds = trained(dataset, plan, 4)
    row = {"key": key, "tokens": points[-1][0], "val_loss": points[-1][1], "seconds": seconds, "curve": points}
    with open(results, "a") as file:
        file.write(json.dumps(row) + "\n")
    short = {k: v for k, v in settings.items() if k in ("learning_rate", "max_steps", "tokens_per_step", "optimizer", "seed", "beta2")}
    print(f"{label} {short} val {points[-1][1]:.4f} {seconds:.0f}s", flush=True)
    return row
