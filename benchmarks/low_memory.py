"""What each low-memory setting costs in loss, compared with plain AdamW.

    python benchmarks/low_memory.py [--seeds 1 2 3] [--steps 600] [--plot docs/low-memory.png]

Trains on tinyshakespeare in characters, 2 layers × 128, block 64, 3,072 tokens per step; then fine-tunes the plain
run's weights with half as many steps at a tenth of the learning rate. Runs are written to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch

from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.prepare_texts import prepare_texts
from gpt2box.data.sources import load_texts
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest

TEXT = Path(__file__).parents[1] / "tests" / "data_files" / "tinyshakespeare.txt"
SETTINGS = {
    "dataset": "text", "n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 64, "tokens_per_step": 3072,
    "beta2": 0.99, "eval_windows": 600, "device": "cpu", "log_interval": 1000, "keep_last": 1, "micro_batch_size": 48,
    "activation_checkpointing": "none",
}  # fmt: skip
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "optimizer_states int8": {"optimizer_states": "int8"},
    "weights_dtype bfloat16": {"weights_dtype": "bfloat16"},
    "optimizer_in_backward, 1 micro-step": {"optimizer_in_backward": True},
    "optimizer_in_backward, 4 micro-steps": {"optimizer_in_backward": True, "micro_batch_size": 12},
    "optimizer_in_backward, 16 micro-steps": {"optimizer_in_backward": True, "micro_batch_size": 3},
    "all three, 4 micro-steps": {
        "optimizer_states": "int8", "weights_dtype": "bfloat16", "optimizer_in_backward": True, "micro_batch_size": 12,
    },
}  # fmt: skip


def train_curve(volumes: Path, name: str, **settings: object) -> list[tuple[int, float]]:
    """Train a run; returns its (step, val_loss) pairs."""
    values = {key: str(value) for key, value in {**SETTINGS, "name": name, **settings}.items()}
    run_job(None, values, StopRequest())
    lines = (volumes / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["step"], row["val_loss"]) for row in rows if row["kind"] == "eval"]


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Plot the difference to plain AdamW by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    plain = dict(curves["plain"])
    for name, points in curves.items():
        if name != "plain":
            axes.plot([s for s, _ in points[1:]], [loss - plain[s] for s, loss in points[1:]], label=name)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("val_loss - val_loss of plain AdamW (mean over seeds)")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    steps, threads = arguments.steps, torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        volumes = Path(folder)
        os.environ["GPT2BOX_VOLUMES"] = folder
        prepare_texts(load_texts([str(TEXT)]), PrepareConfig("char", 0.1), volumes / "data" / "text")
        scratch: dict[str, list[list[tuple[int, float]]]] = {variant: [] for variant in VARIANTS}
        tuned: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for seed in arguments.seeds:
            for number, (variant, settings) in enumerate(VARIANTS.items()):
                common = {"seed": seed, "max_steps": steps, "learning_rate": 2e-3, "eval_interval": steps // 10}
                common["warmup_steps"] = steps // 10
                scratch[variant].append(train_curve(volumes, f"{number}-{seed}", **common, **settings))
                start = volumes / "runs" / f"0-{seed}" / "checkpoints" / "last"
                common |= {"max_steps": steps // 2, "learning_rate": 2e-4, "init_from": str(start)}
                tuned[variant].append(train_curve(volumes, f"tuned-{number}-{seed}", **common, **settings)[-1][1])
    print(f"{threads} threads, {steps} steps, seeds {arguments.seeds}: mean val_loss ± deviation of the difference")
    plain, plain_tuned = scratch["plain"], tuned["plain"]
    for variant in VARIANTS:
        ends = [run[-1][1] for run in scratch[variant]]
        differences = [end - run[-1][1] for end, run in zip(ends, plain, strict=True)]
        tuned_differences = [end - other for end, other in zip(tuned[variant], plain_tuned, strict=True)]
        spread = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in (differences, tuned_differences)]
        print(
            f"| {variant} | {statistics.mean(ends):.4f} | {statistics.mean(differences):+.4f} ± {spread[0]:.4f} "
            f"| {statistics.mean(tuned[variant]):.4f} | {statistics.mean(tuned_differences):+.4f} ± {spread[1]:.4f} |"
        )
    if arguments.plot:
        means = {
            variant: [(runs[0][i][0], statistics.mean(run[i][1] for run in runs)) for i in range(len(runs[0]))]
            for variant, runs in scratch.items()
        }
        plot(means, arguments.plot)


if __name__ == "__main__":
    main()
