"""Fine-tuning at a small scale, on a text unlike the first one.

    python benchmarks/finetune.py rates [--steps 600] [--base-steps 4000] [--seeds 1 2] [--plot docs/finetune.png]
    python benchmarks/finetune.py small [--passes 3.5 7 14] [--characters 100_000] [--base-steps 4000] [--seeds 1 2]

A network of 2 layers × 128 learns tinyshakespeare in characters; from there it is tuned on the manual that comes with
Python (`pydoc_data`, 0.7 MB). `rates`: every learning rate of a list, all weights against adapters. `small`: all
weights on the manual's beginning alone, learning rate × passes over it × dropout. Printed: the least val_loss, and at
which step; for `small` also where a patience of 3 evaluations, 15 to a run, would have stopped it, and with which loss.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from low_memory import SETTINGS, TEXT, train_curve

from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.prepare_texts import prepare_texts
from gpt2box.data.sources import load_texts

RATES = {"all weights": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "adapters": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]}
RANKS = (2, 8, 32)
SMALL_RATES, DROPOUTS = (3e-4, 1e-3, 3e-3), (0.0, 0.1, 0.2)
TOKENS_PER_STEP = int(str(SETTINGS["tokens_per_step"]))
EVALUATIONS, PATIENCE = 15, 3  # of a run, as configs/finetune.yaml has them


def texts(volumes: Path, characters_of_second: int | None) -> None:
    """Both as datasets of one vocabulary: each begins with a line of all the characters that either has."""
    first, second = TEXT.read_text(), "\n\n".join(topics.values())
    characters = "".join(sorted(set(first + second) - {"\n"})) + "\n"
    for name, text in (("first", first), ("second", second[:characters_of_second])):
        path = volumes / f"{name}.txt"
        path.write_text(characters + text)
        prepare_texts(load_texts([str(path)]), PrepareConfig("char", 0.1), volumes / "data" / name)


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


def learning_rates(volumes: Path, arguments: argparse.Namespace) -> None:
    """All weights and adapters, by learning rate."""
    ways: dict[str, tuple[str, dict[str, int]]] = {"all weights": ("all weights", {})} | {
        f"adapters of rank {rank}": ("adapters", {"lora_rank": rank}) for rank in RANKS
    }
    least: dict[str, dict[float, float]] = {}
    print(f"{'way':24} {'learning rate':>13} {'val_loss':>9} {'deviation':>10}  best at step", flush=True)
    for way, (kind, settings) in ways.items():
        for rate in RATES[kind]:
            ends = []
            for seed in arguments.seeds:
                run = f"{way} {rate:g} {seed}".replace(" ", "-").replace(".", "p")
                rows = tuned(volumes, run, arguments.steps, 12, learning_rate=rate, seed=seed, **settings)
                ends.append(min(rows, key=lambda row: row[1]))
            losses = [loss for _, loss in ends]
            least.setdefault(way, {})[rate] = statistics.mean(losses)
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            steps = ", ".join(f"{step}" for step, _ in ends)
            print(f"{way:24} {rate:13g} {statistics.mean(losses):9.4f} {spread:10.4f}  {steps}", flush=True)
    if arguments.plot:
        plot(least, arguments.plot)


def small_text(volumes: Path, arguments: argparse.Namespace) -> None:
    """All weights on little text, by learning rate, passes over it and dropout."""
    tokens = (volumes / "data" / "second" / "train.bin").stat().st_size // 2
    print(f"passes, learning rate, dropout: least val_loss (at step); with patience {PATIENCE} (stopped at step)")
    for passes in arguments.passes:
        for rate in SMALL_RATES:
            for dropout in DROPOUTS:
                steps = round(passes * tokens / TOKENS_PER_STEP)
                least, patient = [], []
                for seed in arguments.seeds:
                    run = f"{passes:g}-{rate:g}-{dropout:g}-{seed}".replace(".", "p")
                    rows = tuned(volumes, run, steps, EVALUATIONS, learning_rate=rate, dropout=dropout, seed=seed)
                    least.append(min(rows, key=lambda row: row[1]))
                    patient.append(stopped(rows))
                best, kept = (statistics.mean(loss for _, loss in rows) for rows in (least, patient))
                at, over = (", ".join(str(step) for step, _ in rows) for rows in (least, patient))
                print(
                    f"{passes:4g} {rate:7g} {dropout:4g}: {best:.4f} ({at} of {steps}); {kept:.4f} ({over})", flush=True
                )


def tuned(volumes: Path, run: str, steps: int, evaluations: int, **settings: object) -> list[tuple[int, float]]:
    """(step, val_loss) of a fine-tuning of the base."""
    own = {"init_from": "base", "dataset": "second", "max_steps": steps, "min_lr": 0, "lr_schedule": "linear"}
    return train_curve(volumes, run, **{**own, "eval_interval": max(steps // evaluations, 1), **settings})


def stopped(rows: list[tuple[int, float]]) -> tuple[int, float]:
    """Return the step at which patience would end the run, and the best val_loss until then."""
    best, without = rows[0], 0
    for row in rows[1:]:
        best, without = (row, 0) if row[1] < best[1] else (best, without + 1)
        if without == PATIENCE:
            return row[0], best[1]
    return rows[-1][0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", choices=["rates", "small"])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--base-steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--passes", type=float, nargs="+", default=[3.5, 7, 14])
    parser.add_argument("--characters", type=int, default=100_000)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        volumes = Path(folder)
        os.environ["GPT2BOX_VOLUMES"] = folder
        texts(volumes, arguments.characters if arguments.sweep == "small" else None)
        train_curve(
            volumes, "base", dataset="first", max_steps=arguments.base_steps, learning_rate=3e-3, eval_interval=500
        )
        (volumes / "models").mkdir(exist_ok=True)
        (volumes / "models" / "base").symlink_to((volumes / "runs/base/checkpoints/best").resolve())
        {"rates": learning_rates, "small": small_text}[arguments.sweep](volumes, arguments)


if __name__ == "__main__":
    main()
