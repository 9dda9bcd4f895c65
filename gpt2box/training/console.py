"""Show a run's progress: a live panel on a terminal, plain lines elsewhere and in log.txt."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

from gpt2box.planner.run_plan import RunPlan
from gpt2box.runs.formatting import format_figures, format_log_line, format_loss, format_step
from gpt2box.system.gpu import Gpu, find_gpu
from gpt2box.utils.progress import (
    LINE_SECONDS,
    StderrRedirect,
    format_bytes,
    format_duration,
    log_line,
    log_to_file,
    open_text_stream,
)

TREND_LENGTH = 48  # logged losses in the panel's curve
BARS = "▁▂▃▄▅▆▇█"
GPU_QUERY_SECONDS = 2.0  # between queries of the driver


class Display:
    """The console output of one training session. Each call reports news."""

    def __init__(self, name: str, step: int, plan: RunPlan) -> None:
        self.name, self.step, self.plan = name, step, plan
        self.losses: deque[tuple[int, float]] = deque(maxlen=TREND_LENGTH)
        self.figures: dict[str, str] = {}  # of the newest train row
        self.seconds_left = 0.0
        self.val_loss = ""
        self.sample_lines: list[str] = []
        self.gpu: Gpu | None = None
        self._queried_at = self._printed_at = 0.0
        self._skipped_reported = ""
        self._live: Any = None
        if plan.config.log_format == "auto" and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # Warnings and whatever else is written to standard error then appears above the panel.
            self._aside = StderrRedirect()
            self._console = Console(file=open_text_stream(os.dup(self._aside.terminal), closefd=True))
            self._width = self._console.width
            self._live = Live(get_renderable=self.panel, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()

    def show_train_row(self, step: int, row: dict[str, Any], seconds_left: float) -> None:
        """Show a train row of metrics.jsonl; as a line at most every LINE_SECONDS."""
        self.step, self.seconds_left = step, seconds_left
        self.figures = format_figures(row, peak_tflops=self.plan.derived.peak_tflops)
        if row["loss"] is not None:
            self.losses.append((step, row["loss"]))
        now = time.monotonic()
        if self._live is not None:
            self.flush_stderr()
            if now - self._queried_at >= GPU_QUERY_SECONDS:
                self._queried_at, self.gpu = now, find_gpu(self.plan.derived.device)
        if now - self._printed_at < LINE_SECONDS and step != self.plan.config.max_steps:
            return
        self._printed_at = now
        figures = dict(self.figures)
        if (skipped := figures.get("skipped", "")) == self._skipped_reported:
            figures.pop("skipped", None)
        self._skipped_reported = skipped
        is_shown_elsewhere = self._live is not None or self.plan.config.log_format == "json"
        line = format_log_line(step, self.plan.config.max_steps, figures, format_duration(seconds_left))
        (log_to_file if is_shown_elsewhere else log_line)(line)

    def show_evaluation(self, step: int, val_loss: float, is_best: bool, best: float | None, best_step: int) -> None:
        """Print an evaluation as a permanent line, and show it in the panel."""
        compared = "the best so far" if is_best else f"best {format_loss(best, best_step)}" if best is not None else ""
        self.val_loss = f"{format_loss(val_loss, step)}, {compared}".rstrip(", ")
        self.print_line(
            format_log_line(
                step, self.plan.config.max_steps, {"val_loss": f"{val_loss:.4f}{'  best' if is_best else ''}"}
            )
        )

    def show_sample(self, lines: list[str]) -> None:
        """Print the beginning of a generated text."""
        # A byte-level model may generate a terminal's control sequences.
        lines = ["".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in x) for x in lines]
        self.sample_lines = lines[:3]
        if self._live is not None:
            from rich.text import Text

            console = self._console
            lines = [
                part.plain.rstrip() for x in lines for part in Text(x or " ").wrap(console, max(console.width - 6, 20))
            ]
        self.print_line("\n".join(f"    | {line}" for line in lines))

    def print_line(self, text: str) -> None:
        """Print a permanent line, above the panel if there is one."""
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False)
            log_to_file(text)
        else:
            log_line(text)

    def flush_stderr(self) -> None:
        """Print standard error's lines above the panel. Clear a screen that became narrower: its lines broke."""
        console = self._console
        if console.width < self._width:
            console.clear()
        self._width = console.width
        for text in self._aside.news():
            console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Remove the panel and restore standard error."""
        if self._live is not None:
            self.flush_stderr()
            self._live.stop()
            self._console.file.close()
            self._aside.close()

    def panel(self) -> RenderableType:
        """Render the panel."""
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_row("step", self._format_progress())
        grid.add_row("", ProgressBar(total=max(self.plan.config.max_steps, 1), completed=self.step))
        if self._aside.request:
            grid.add_row("stopping", Text(self._aside.request, style="bold"))
        for name, text in self.panel_lines().items():
            grid.add_row(name, Text(text))
        width = max(
            self._console.width - 3, 20
        )  # leaves room for the ^C that a terminal echoes, which would wrap the line
        return Panel(grid, title=Text(self.name), title_align="left", border_style="dim", width=width)

    def panel_lines(self) -> dict[str, str]:
        """Format the panel's lines, by name."""
        figures, lines = self.figures, {}
        if self.losses:
            lines["loss"] = f"{format_loss(self.losses[-1][1])}  {sparkline([x for _, x in self.losses])}{self.trend()}"
        if self.val_loss:
            lines["val_loss"] = self.val_loss
        if figures:
            names = [f"{name} {figures[name]}" for name in ("learning rate", "gradient norm")]
            lines["optimizer"] = ", ".join([*names, *([figures["skipped"]] if "skipped" in figures else [])])
            lines["speed"] = figures["speed"] + (f", MFU {figures['MFU']}" if "MFU" in figures else "")
            lines["memory"] = f"{figures['peak memory']} at most"
        if gpu := self.gpu:
            if gpu.total_bytes and gpu.free_bytes is not None:
                lines["memory"] += (
                    f"; the GPU: {format_bytes(gpu.total_bytes - gpu.free_bytes)} of "
                    f"{format_bytes(gpu.total_bytes)} in use"
                )
            sensors = [f"{gpu.temperature_c} °C"] if gpu.temperature_c is not None else []
            sensors += [f"{gpu.power_w:.0f} W"] if gpu.power_w is not None else []
            lines["GPU"] = ", ".join([gpu.name, *sensors])
        if self.sample_lines:
            lines["sample"] = "\n".join(self.sample_lines)
        return lines

    def _format_progress(self) -> str:
        left = (
            f", {format_duration(self.seconds_left)} left"
            if self.figures and self.step < self.plan.config.max_steps
            else ""
        )
        return format_step(self.step, self.plan.config.max_steps) + left

    def trend(self) -> str:
        """Format the difference of the mean losses in the second and first half of the curve."""
        losses = [loss for _, loss in self.losses]
        half = len(losses) // 2
        if not half:
            return ""
        change = sum(losses[-half:]) / half - sum(losses[:half]) / half
        return f"  {change:+.4f} in {self.losses[-1][0] - self.losses[0][0]:,} steps"


def sparkline(values: list[float]) -> str:
    """Draw a curve in one line of text."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)
