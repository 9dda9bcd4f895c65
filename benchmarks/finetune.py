"""Fine-tuning at a small scale: which learning rate, all weights against adapters, on a text unlike the first one.

    python benchmarks/finetune.py [--steps 600] [--base-steps 4000] [--seeds 1 2] [--plot docs/finetune.png]

A network of 2 layers × 128 learns tinyshakespeare in characters; from there it is tuned on the manual that comes with
Python (`pydoc_data`, 0.7 MB), with every learning rate of a list. Printed: the least val_loss, and at which step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from low_memory import TEXT, curve

from gpt2box.data.corpora import own_text
from gpt2box.data.few import Request, prepare_few

RATES = {"all weights": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "adapters": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]}
RANKS = (2, 8, 32)


def texts(volumes: Path) -> None:
    """Both as datasets of one vocabulary: each begins with a line of all the characters that either has."""
    first, second = TEXT.read_text(), "\n\n".join(topics.values())
    characters = "".join(sorted(set(first + second) - {"\n"})) + "\n"
    for name, text in (("first", first), ("second", second)):
        path = volumes / f"{name}.txt"
        path.write_text(characters + text)
        prepare_few(own_text([str(path)]), Request("char", 0.1), volumes / "data" / name)


def plot(least: dict[str, dict[float, float]], path: Path) -> None:
    """Least val_loss by learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for way, losses in least.items():
        axes.plot(list(losses), list(losses.values()), marker="o", label=way)
    axes.set(xscale="log", xlabel="learning rate", ylabel="least val_loss of the tuned text")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--base-steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    ways = {"all weights": ("all weights", {})} | {
        f"adapters of rank {rank}": ("adapters", {"lora_rank": rank}) for rank in RANKS
    }
    with tempfile.TemporaryDirectory() as folder:
        volumes = Path(folder)
        os.environ["GPT2BOX_VOLUMES"] = folder
        texts(volumes)
        curve(volumes, "base", dataset="first", max_steps=arguments.base_steps, learning_rate=3e-3, eval_interval=500)
        (volumes / "models").mkdir(exist_ok=True)
        (volumes / "models" / "base").symlink_to((volumes / "runs/base/checkpoints/best").resolve())
        tuned = {"init_from": "base", "dataset": "second", "max_steps": arguments.steps, "min_lr": 0}
        tuned |= {"lr_schedule": "linear", "eval_interval": max(arguments.steps // 12, 1)}
        least: dict[str, dict[float, float]] = {}
        print(f"{'way':24} {'learning rate':>13} {'val_loss':>9} {'deviation':>10}  best at step", flush=True)
        for way, (kind, settings) in ways.items():
            for rate in RATES[kind]:
                ends = []
                for seed in arguments.seeds:
                    run = f"{way} {rate:g} {seed}".replace(" ", "-").replace(".", "p")
                    ends.append(
                        min(
                            curve(volumes, run, learning_rate=rate, seed=seed, **tuned, **settings),
                            key=lambda row: row[1],
                        )
                    )
                losses = [loss for _, loss in ends]
                least.setdefault(way, {})[rate] = statistics.mean(losses)
                spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
                steps = ", ".join(f"{step}" for step, _ in ends)
                print(f"{way:24} {rate:13g} {statistics.mean(losses):9.4f} {spread:10.4f}  {steps}", flush=True)
        if arguments.plot:
            plot(least, arguments.plot)


if __name__ == "__main__":
    main()
