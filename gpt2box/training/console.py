"""What the user sees of a run while it goes: a panel on a terminal, sober lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

from gpt2box.planner.run_plan import RunPlan
from gpt2box.runs.metrics import format_skipped_steps
from gpt2box.system.gpu import Card, card_of
from gpt2box.utils.progress import LINE_SECONDS, Aside, duration, note, say, size, text_to

TREND = 48  # logged losses that the panel draws
BARS = "▁▂▃▄▅▆▇█"
CARD_SECONDS = 2.0  # between questions to the driver


class Display:
    """Begins with nothing to show; each call says what is new."""

    def __init__(self, name: str, step: int, plan: RunPlan) -> None:
        self.name, self.step, self.plan = name, step, plan
        self.losses: deque[tuple[int, float]] = deque(maxlen=TREND)
        self.row: dict[str, Any] = {}  # as in metrics.jsonl
        self.seconds_left = 0.0
        self.val = ""
        self.sampled: list[str] = []
        self.card: Card | None = None
        self._asked = self._printed = 0.0
        self._said_left_out = 0
        self._live: Any = None
        if plan.log_format == "auto" and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # What others write to standard error, warnings too, then appears above the panel.
            self._aside = Aside()
            self._console = Console(file=text_to(os.dup(self._aside.terminal), closefd=True))
            self._width = self._console.width
            self._live = Live(get_renderable=self.panel, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()

    def train(self, step: int, row: dict[str, Any], seconds_left: float) -> None:
        """Show the figures of a line of metrics.jsonl; a log has one every few seconds."""
        self.step, self.row, self.seconds_left = step, row, seconds_left
        if row["loss"] is not None:
            self.losses.append((step, row["loss"]))
        now = time.monotonic()
        if self._live is not None:
            self.tidy()
            if now - self._asked >= CARD_SECONDS:
                self._asked, self.card = now, card_of(self.plan.device)
        if now - self._printed < LINE_SECONDS and step != self.plan.max_steps:
            return
        self._printed = now
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        news = f"  {format_skipped_steps(row)}" if row["skipped_steps"] > self._said_left_out else ""
        self._said_left_out = row["skipped_steps"]
        shown_otherwise = self._live is not None or self.plan.log_format == "json"
        (note if shown_otherwise else say)(
            f"step {step:,}/{self.plan.max_steps:,}  loss {loss}  {row['tokens_per_sec']:,.0f} tokens/s  "
            f"{size(row['peak_memory_bytes'])}  {duration(seconds_left)} left{news}"
        )

    def evaluated(self, step: int, val_loss: float, improved: bool, best: float | None, best_step: int) -> None:
        """A line that stays, and a line of the panel."""
        of_all = "the best so far" if improved else f"best {best:.4f} at step {best_step:,}" if best is not None else ""
        self.val = f"{val_loss:.4f} at step {step:,}, {of_all}".rstrip(", ")
        self.line(f"step {step:,}/{self.plan.max_steps:,}  val_loss {val_loss:.4f}{'  best' if improved else ''}")

    def sample(self, lines: list[str]) -> None:
        """The beginning of a text that the network wrote."""
        # A network of bytes may write what a terminal takes for an order.
        lines = ["".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in x) for x in lines]
        self.sampled = lines[:3]
        if self._live is not None:
            from rich.text import Text

            console = self._console
            lines = [
                part.plain.rstrip() for x in lines for part in Text(x or " ").wrap(console, max(console.width - 6, 20))
            ]
        self.line("\n".join(f"    | {line}" for line in lines))

    def line(self, text: str) -> None:
        """A line that stays, above the panel where there is one."""
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False)
            note(text)
        else:
            say(text)

    def tidy(self) -> None:
        """Bring above the panel what went past it, and begin on a clean screen where a narrower one broke its lines."""
        console = self._console
        if console.width < self._width:
            console.clear()
        self._width = console.width
        for text in self._aside.news():
            console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._live is not None:
            self.tidy()
            self._live.stop()
            self._console.file.close()
            self._aside.close()

    def panel(self) -> RenderableType:
        """All that is known now."""
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_row("step", f"{self.step:,} of {self.plan.max_steps:,}{self.to_the_end()}")
        grid.add_row("", ProgressBar(total=max(self.plan.max_steps, 1), completed=self.step))
        if self._aside.request:
            grid.add_row("stopping", Text(self._aside.request, style="bold"))
        for name, text in self.lines().items():
            grid.add_row(name, Text(text))
        width = max(self._console.width - 3, 20)  # or the ^C of who stops it moves the cursor down
        return Panel(grid, title=Text(self.name), title_align="left", border_style="dim", width=width)

    def lines(self) -> dict[str, str]:
        """The panel's text, by what it is about."""
        row, found = self.row, {}
        if self.losses:
            found["loss"] = f"{self.losses[-1][1]:.4f}  {spark([loss for _, loss in self.losses])}{self.trend()}"
        if self.val:
            found["val_loss"] = self.val
        if row:
            norm = "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.3g}"
            found["optimizer"] = f"learning rate {row['learning_rate']:.3g}, gradient norm {norm}"
            if row["skipped_steps"]:
                found["optimizer"] += f", {format_skipped_steps(row)}"
            found["speed"] = f"{row['tokens_per_sec']:,.0f} tokens/s"
            if row["mfu"] is not None:
                found["speed"] += f", MFU {row['mfu']:.0%} of {self.plan.peak_tflops:g} TFLOPS"
            found["memory"] = f"{size(row['peak_memory_bytes'])} at most"
        if card := self.card:
            if card.total_bytes and card.free_bytes is not None:
                used = card.total_bytes - card.free_bytes
                found["memory"] += f"; the card: {size(used)} of {size(card.total_bytes)} in use"
            heat = [f"{card.temperature_c} °C"] if card.temperature_c is not None else []
            heat += [f"{card.power_w:.0f} W"] if card.power_w is not None else []
            found["card"] = ", ".join([card.name, *heat])
        if self.sampled:
            found["sample"] = "\n".join(self.sampled)
        return found

    def to_the_end(self) -> str:
        """Once there is a rate."""
        return f", {duration(self.seconds_left)} left" if self.row and self.step < self.plan.max_steps else ""

    def trend(self) -> str:
        """How the second half of what is drawn differs from the first."""
        losses = [loss for _, loss in self.losses]
        half = len(losses) // 2
        if not half:
            return ""
        change = sum(losses[-half:]) / half - sum(losses[:half]) / half
        return f"  {change:+.4f} in {self.losses[-1][0] - self.losses[0][0]:,} steps"


def spark(values: list[float]) -> str:
    """A curve of one line."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)
