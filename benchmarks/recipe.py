"""Compare how many tokens Muon and AdamW need to reach a loss, each with its best learning rate of a sweep.

    gpt2box prepare shakespeare --tokenizer char --name shakespeare-char
    python benchmarks/recipe.py [--sizes small medium] [--seeds 1 2 3] [--dataset NAME] [--plot docs/recipe.png]

AdamW trains on N tokens: with the first seed at every learning rate of the sweep, then with all seeds at the best one.
Muon does the same on the shares of N in `SHARES`; each share is a separate run whose learning rate decays to zero. The
share at which Muon reaches AdamW's final loss is interpolated on a logarithmic scale. Muon is also compared with
nanoGPT's published recipe for a CPU: 2,000 steps of 12 × 64 characters. No run completes a pass over the text. Results
are stored in `--results`, one JSON line per run, and runs found there are skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gpt2box.config import loader
from gpt2box.data.dataloader import TrainWindows, inputs_and_targets, micro_batches
from gpt2box.data.dataset import Dataset, open_dataset
from gpt2box.distributed.group import RankGroup
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.shape import ModelShape
from gpt2box.optim.clipped_step import make_optimizer_step
from gpt2box.optim.factory import make_optimizer
from gpt2box.optim.schedule import learning_rate_at
from gpt2box.planner.run_plan import RunPlan, make_run_plan
from gpt2box.planner.search import list_execution_plans
from gpt2box.planner.target_device import TargetDevice
from gpt2box.training.evaluate import evaluate
from gpt2box.utils.paths import dataset_dir
from gpt2box.utils.ranks import SINGLE_PROCESS

SIZES = {"small": {"n_layer": 2}, "medium": {"n_layer": 4}}  # medium is nanoGPT's model for a CPU
COMMON = {"n_head": 4, "n_embd": 128, "block_size": 64, "bias": "false", "beta2": 0.99}
OURS = {**COMMON, "micro_batch_size": 24, "tokens_per_step": 1536, "min_lr": 0, "lr_schedule": "linear"}
RECIPES: dict[str, dict[str, Any]] = {
    "nanogpt": {
        **COMMON, "micro_batch_size": 12, "tokens_per_step": 768, "learning_rate": 1e-3, "min_lr": 1e-4,
        "warmup_steps": 100, "max_steps": 2000,
    },
    "adamw": {**OURS, "warmup_steps": 50},
    "muon": {**OURS, "warmup_steps": 20, "optimizer": "muon"},
}  # fmt: skip
STEPS = {"small": 666, "medium": 266}  # AdamW's steps, N
SHARES = (0.37, 0.6)  # of STEPS, for Muon; its sweep uses the last
SHARES_OF_NANOGPT = (0.22, 0.37)  # of the tokens of nanoGPT's recipe, for Muon
SWEEP = {"adamw": (2.5e-3, 5e-3, 1e-2, 2e-2), "muon": (1e-2, 2e-2, 4e-2)}


@dataclass
class Runs:
    """Training runs on one dataset, with stored results."""

    dataset: Dataset
    results: Path

    def run(self, size: str, recipe: str, seed: int, **settings: Any) -> dict[str, Any]:
        """Return tokens, val_loss, seconds and curve of a run; train it if the results lack it."""
        settings = {**SIZES[size], **RECIPES[recipe], "seed": seed, **settings}
        key = {"dataset": self.dataset.digest, "size": size, "recipe": recipe, "settings": settings}
        for line in self.results.read_text().splitlines() if self.results.exists() else []:
            if (row := json.loads(line))["key"] == key:
                return dict(row)
        plan = make_cpu_plan(self.dataset, settings)
        curve, seconds = train(self.dataset, plan)
        row = {"key": key, "tokens": curve[-1][0], "val_loss": curve[-1][1], "seconds": seconds, "curve": curve}
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        description = f"learning rate {plan.config.learning_rate:g}, {row['tokens']:,} tokens, seed {seed}"
        print(f"{size} {recipe}: {description}: {row['val_loss']:.4f} in {seconds:.0f} s", flush=True)
        return row

    def best_rate(self, size: str, recipe: str, seed: int, steps: int) -> float:
        """Return the learning rate of the sweep with the lowest loss."""
        losses = {
            rate: self.run(size, recipe, seed, learning_rate=rate, max_steps=steps)["val_loss"]
            for rate in SWEEP[recipe]
        }
        best = min(losses, key=lambda rate: losses[rate])
        print(f"{size} {recipe}: {', '.join(f'{r:g}: {losses[r]:.4f}' for r in sorted(losses))}; best {best:g}")
        return best


def make_cpu_plan(dataset: Dataset, settings: dict[str, Any]) -> RunPlan:
    """Plan a run like `gpt2box train`, in float32 on the CPU."""
    flags = {"dataset": "x", "activation_checkpointing": "none", "eval_windows": 600, "device": "cpu", **settings}
    config = loader.load_config(None, {key: str(value) for key, value in flags.items()})[0]
    vocab_size = dataset.tokenizer.vocab_size
    shape = ModelShape(**config.shape(), block_size=config.block_size, vocab_size=vocab_size, bias=config.bias)
    way = list_execution_plans(
        config, shape, TargetDevice("this CPU", 1 << 62, None, "float32", on_gpu=False, compiled=False)
    )[0]
    return make_run_plan(config, shape, dataset.tokens("train"), "cpu", "float32", way)


def train(dataset: Dataset, plan: RunPlan, evaluations: int = 4) -> tuple[list[tuple[int, float]], float]:
    """Train; return the curve of (tokens, val_loss) and the thread's seconds without evaluations."""
    model = GPT2(plan.shape, plan.config.dropout)
    model.init_weights(plan.config.seed)
    model.loss_chunk_tokens = plan.config.loss_chunk_tokens
    update = make_optimizer_step(make_optimizer(model, plan), plan)
    windows = TrainWindows(dataset.tokens("train"), plan.shape.block_size, plan.config.seed)
    path, curve, seconds = dataset.folder / "train.bin", [], 0.0
    with closing(
        micro_batches(path, windows, plan.shape.vocab_size, 0, plan.execution.micro_batch_size, False, 1)
    ) as batches:
        for step in range(plan.config.max_steps):
            begun = time.thread_time()
            total = torch.zeros(())
            for micro_step in range(plan.execution.grad_accum_steps):
                inputs, targets = inputs_and_targets(next(batches))
                loss = model(inputs, targets, 1.0 / plan.execution.grad_accum_steps)
                update.before_backward(step, micro_step, learning_rate_at(step, plan), loss)
                loss.backward()
                total += loss.detach()
            update(total)
            seconds += time.thread_time() - begun
            if (step + 1) % (plan.config.max_steps // evaluations) == 0 or step + 1 == plan.config.max_steps:
                curve.append(
                    (
                        (step + 1) * plan.config.tokens_per_step,
                        evaluate(model, dataset, plan, RankGroup(SINGLE_PROCESS))[0],
                    )
                )
    return curve, seconds


def tokens_to(loss: float, rows: list[dict[str, Any]]) -> float:
    """Tokens at which runs of several lengths come to a loss: a line through the two lengths next to it."""
    rows = sorted(rows, key=lambda row: row["tokens"])
    pairs = list(pairwise(rows))
    a, b = next((pair for pair in pairs if pair[1]["val_loss"] <= loss), pairs[-1])
    slope = (math.log(b["tokens"]) - math.log(a["tokens"])) / (b["val_loss"] - a["val_loss"])
    return math.exp(math.log(a["tokens"]) + slope * (loss - a["val_loss"]))


def compare(runs: Runs, size: str, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Run all recipes of a size and print the table's rows; return the results by recipe and length."""
    lengths = [round(STEPS[size] * share) for share in SHARES]
    adamw_rate = runs.best_rate(size, "adamw", seeds[0], STEPS[size])
    muon_rate = runs.best_rate(size, "muon", seeds[0], lengths[-1])
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        muon = [runs.run(size, "muon", seed, learning_rate=muon_rate, max_steps=steps) for steps in lengths]
        adamw = runs.run(size, "adamw", seed, learning_rate=adamw_rate, max_steps=STEPS[size])
        for name, row in {"adamw": adamw, **{f"muon {row['tokens']}": row for row in muon}}.items():
            results.setdefault(name, []).append(row)
        losses = " | ".join(f"{row['val_loss']:.4f}" for row in (*muon, adamw))
        print(f"| {size}, seed {seed} | {losses} | {ratios(muon, adamw)} |", flush=True)
    return results


def compare_with_published(runs: Runs, size: str, seeds: list[int], results: dict[str, list[dict[str, Any]]]) -> None:
    """Compare Muon with nanoGPT's recipe, print the rows, and add the results to `results`."""
    rate = next(row for name, (row, *_) in results.items() if name.startswith("muon"))["key"]["settings"][
        "learning_rate"
    ]
    for seed in seeds:
        nanogpt = runs.run(size, "nanogpt", seed)
        results.setdefault("nanogpt", []).append(nanogpt)
        lengths = [round(nanogpt["tokens"] * share / OURS["tokens_per_step"]) for share in SHARES_OF_NANOGPT]
        ours = [runs.run(size, "muon", seed, learning_rate=rate, max_steps=steps) for steps in lengths]
        losses = " | ".join(f"{row['val_loss']:.4f}" for row in (*ours, nanogpt))
        print(f"| {size}, seed {seed} | {losses} | {ratios(ours, nanogpt)} |", flush=True)


def ratios(muon: list[dict[str, Any]], other: dict[str, Any]) -> str:
    """Return the ratios of tokens and time that Muon needs to reach the other run's final loss."""
    tokens = tokens_to(other["val_loss"], muon)
    seconds = tokens * muon[-1]["seconds"] / muon[-1]["tokens"]
    return f"{tokens / other['tokens']:.2f} | {seconds / other['seconds']:.2f}"


def plot(results: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Plot val_loss over tokens, averaged over seeds, with one panel per size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(9, 4), layout="constrained", squeeze=False)
    colours = {"nanogpt": "tab:grey", "adamw": "tab:blue", "muon": "tab:orange"}
    labels = {"nanogpt": "nanoGPT's recipe", "adamw": "AdamW, tuned", "muon": "Muon, tuned"}
    for axes, (size, by_name) in zip(panels[0], results.items(), strict=True):
        for name, rows in by_name.items():
            recipe = name.split()[0]
            points = [
                (p[0][0], statistics.mean(v for _, v in p)) for p in zip(*(r["curve"] for r in rows), strict=True)
            ]
            axes.plot(*zip(*points, strict=True), marker=".", color=colours[recipe], label=labels.pop(recipe, None))
        axes.set_title(f"{size}: {SIZES[size]['n_layer']} layers × {COMMON['n_embd']}, {len(by_name['adamw'])} seeds")
        axes.set_xlabel("tokens")
        axes.set_ylabel("val_loss")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dataset", default="shakespeare-char")
    parser.add_argument("--results", type=Path, default=Path("recipe.jsonl"))
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(open_dataset(dataset_dir(arguments.dataset)), arguments.results)
    results = {size: compare(runs, size, arguments.seeds) for size in arguments.sizes}
    for size in reversed(arguments.sizes):
        compare_with_published(runs, size, arguments.seeds, results[size])
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
