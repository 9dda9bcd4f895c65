"""Draw loss.png: the training and validation loss of a run."""

import io
import os
from pathlib import Path

from gpt2box.runs.history import read_history
from gpt2box.utils.files import write_atomically


def plot_loss(run: Path) -> Path:
    """Draw a run's losses and return the path of loss.png."""
    os.environ["MPLBACKEND"] = "agg"  # overrides the user's: Matplotlib fails to import with an unknown name
    from matplotlib import pyplot

    curves = read_history(run / "metrics.jsonl").curves
    train, val = (curves[name].downsampled() if name in curves else None for name in ("loss", "val_loss"))
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    if train:
        axes.plot(train.step, train.value, color="#9bb7d4", linewidth=1, label="train")
    if val:
        axes.plot(val.step, val.value, color="#b3341f", linewidth=2, marker="o", markersize=3, label="validation")
        step, best = int(val.step[val.value.argmin()]), float(val.value.min())
        axes.annotate(
            f"{best:.4f} at step {step:,}", (step, best), xytext=(-8, 14), textcoords="offset points", ha="right"
        )
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)", title=run.name)
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    path = run / "loss.png"
    figure.tight_layout()
    figure.savefig(png := io.BytesIO(), format="png")
    write_atomically(path, png.getvalue())
    pyplot.close(figure)
    return path
