"""Format a run's figures alike in the console, `gpt2box runs`, the report, the dashboard and the monitor."""

from collections.abc import Mapping
from typing import Any

from gpt2box.runs.metrics import to_number
from gpt2box.utils.files import count_or_zero
from gpt2box.utils.progress import format_bytes


def format_count(count: float) -> str:
    """Format a number of tokens: 512, 12.3k, 1.15M, 9.04G."""
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{sign}" if count < 1000 * unit else f"{count / unit:,.0f}{sign}"
    return f"{count:.0f}"


def format_step(step: int, max_steps: int) -> str:
    """Format progress as `5 of 10`, or `5` if the number of steps is unknown."""
    return f"{step:,} of {max_steps:,}" if max_steps else f"{step:,}"


def format_loss(loss: float | None, step: int | None = None) -> str:
    """Format a loss, with the step that it was measured at if given. None stands for NaN and infinity."""
    text = "not finite" if loss is None else f"{loss:.4f}"
    return text if step is None else f"{text} at step {step:,}"


def format_rate(tokens_per_sec: float) -> str:
    """Format a throughput."""
    return f"{tokens_per_sec:,.0f} tokens/s"


def skip_reason(skipped: int, spikes: int) -> str:
    """Explain why steps were skipped; `spikes` of them had a finite loss."""
    if not spikes:
        return "loss or gradient not finite"
    return f"loss {'not finite or ' if spikes < skipped else ''}far above the steps before"


def format_figures(
    train: Mapping[str, Any], evaluated: Mapping[str, Any] | None = None, peak_tflops: float = 0.0
) -> dict[str, str]:
    """Format a train row and an eval row of metrics.jsonl, by name. What they do not hold is left out."""
    figures = {}
    if "loss" in train:
        figures["loss"] = format_loss(to_number(train["loss"]))
    if evaluated and (val_loss := to_number(evaluated.get("val_loss"))) is not None:
        figures["val_loss"] = format_loss(val_loss, evaluated["step"])
    if (rate := to_number(train.get("tokens_per_sec"))) is not None:
        figures["speed"] = format_rate(rate)
    if (mfu := to_number(train.get("mfu"))) is not None and peak_tflops:
        figures["MFU"] = f"{mfu:.0%} of {peak_tflops:g} TFLOPS"
    for key, name in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")):
        if key in train:
            value = to_number(train[key])
            figures[name] = "not finite" if value is None else f"{value:.3g}"
    if (memory := to_number(train.get("peak_memory_bytes"))) is not None:
        figures["peak memory"] = format_bytes(memory)
    if skipped := count_or_zero(train.get("skipped_steps")):
        reason = skip_reason(skipped, count_or_zero(train.get("loss_spikes")))
        figures["skipped"] = f"{skipped:,} step{'s' * (skipped > 1)} left out: {reason}"
    return figures


def format_log_line(step: int, max_steps: int, figures: Mapping[str, str], time_left: str = "") -> str:
    """Format one line of progress from figures of `format_figures`."""
    parts = [
        f"step {step:,}/{max_steps:,}" if max_steps else f"step {step:,}",
        *(f"{name} {figures[name]}" for name in ("loss", "val_loss") if name in figures),
        *(figures[name] for name in ("speed", "peak memory") if name in figures),
        f"{time_left} left" if time_left else "",
        figures.get("skipped", ""),
    ]
    return "  ".join(part for part in parts if part)
