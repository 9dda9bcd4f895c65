"""loss.png: the training and validation loss of a run."""

from __future__ import annotations

from pathlib import Path

from gpt2box.training.metrics import read


def loss_png(run: Path) -> Path:
    """Draw `run`/metrics.jsonl; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(run / "metrics.jsonl")
    train = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train" and row.get("loss") is not None]
    val = [(row["step"], row["val_loss"]) for row in rows if row["kind"] == "eval" and row.get("val_loss") is not None]
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    if train:
        axes.plot(*zip(*train, strict=True), color="#9bb7d4", linewidth=1, label="train")
    if val:
        axes.plot(*zip(*val, strict=True), color="#b3341f", linewidth=2, marker="o", markersize=3, label="validation")
        step, best = min(val, key=lambda point: point[1])
        axes.annotate(
            f"{best:.4f} at step {step:,}", (step, best), xytext=(-8, 14), textcoords="offset points", ha="right"
        )
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)", title=run.name)
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    path = run / "loss.png"
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path
