"""`gpt2box runs --compare`: compare settings and results of runs, and draw their curves together."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.errors import BadInput
from gpt2box.report.html import Chart, Line, plots_html, render_document, section, table, tag
from gpt2box.runs.formatting import format_count, format_loss, format_step
from gpt2box.runs.view import RunView, as_mapping
from gpt2box.utils.files import write_atomically
from gpt2box.utils.paths import ensure_writable
from gpt2box.utils.progress import format_bytes, format_duration

Rows = dict[str, list[str]]  # by name, a cell for each run
UNKNOWN = "-"


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    runs: list[RunView]
    settings: Rows  # those that differ
    figures: Rows
    notes: list[str]  # warnings about what does not compare

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison for `--json`."""
        names = [run.name for run in self.runs]
        differing = {key: dict(zip(names, values, strict=True)) for key, values in self.settings.items()}
        return {"settings": differing, "runs": [run.summary.as_dict() for run in self.runs], "notes": self.notes}

    def lines(self) -> Iterator[str]:
        """Format the comparison for a terminal."""
        head = ["", *(run.name for run in self.runs)]
        parts = [("settings that differ", self.settings), ("figures", self.figures)]
        cells = [head, *([key, *row] for _, rows in parts for key, row in rows.items())]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

        def aligned(row: list[str]) -> str:
            return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

        yield aligned(head)
        for title, rows in parts:
            yield title if rows else f"{title}: none"
            yield from (aligned([key, *row]) for key, row in rows.items())
        yield from (f"note: {note}" for note in self.notes)


def compare_runs(runs: list[RunView]) -> Comparison:
    """Compare runs. What is missing or damaged is shown as a dash."""
    return Comparison(runs, differing_settings(runs), key_figures(runs), comparison_warnings(runs))


def differing_settings(runs: list[RunView]) -> Rows:
    """Return the settings, other than the name, that differ between runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "name")
    rows = {key: [str(run.settings.get(key, UNKNOWN)) for run in runs] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def key_figures(runs: list[RunView]) -> Rows:
    """Return each run's progress, losses, speed and sizes."""
    columns = []
    for view in runs:
        run, best = view.summary, view.best
        values = {name: curve.value for name, curve in view.history.curves.items()}
        columns.append(
            {
                "state": run.state_label,
                "step": format_step(run.step, run.max_steps),
                "best val_loss": format_loss(best[0]) if best else UNKNOWN,
                "at step": f"{best[1]:,}" if best else UNKNOWN,
                "last train loss": format_loss(values["loss"][-1]) if "loss" in values else UNKNOWN,
                "tokens seen": format_count(run.tokens),
                "time in training": format_duration(run.seconds),
                "tokens a second": f"{np.median(values['tokens_per_sec']):,.0f}"
                if "tokens_per_sec" in values
                else UNKNOWN,
                "peak memory": format_bytes(float(values["peak_memory_bytes"].max()))
                if "peak_memory_bytes" in values
                else UNKNOWN,
                "on disk": format_bytes(run.size_bytes),
            }
        )
    return {name: [column[name] for column in columns] for name in columns[0]}


def comparison_warnings(runs: list[RunView]) -> list[str]:
    """Explain which figures of these runs do not compare."""
    notes = []
    val_sets = {run.history.val_sets[-1] for run in runs if run.history.val_sets}
    if len(val_sets) > 1:
        listed = ", ".join(sorted(val_sets))
        notes.append(f"val_loss does not compare: it is over different validation windows ({listed})")
    checksums = set()
    for run in runs:
        splits = as_mapping(as_mapping(run.manifest.get("dataset")).get("splits"))
        checksums.add(as_mapping(splits.get("train")).get("sha256"))
    if len({checksum for checksum in checksums if checksum}) > 1:
        notes.append("they were trained on different texts")
    return notes


def write_comparison(compared: Comparison, path: Path) -> None:
    """Write a comparison as an HTML page, each chart with the curves of all runs.

    Raises:
        BadInput: `path` cannot be a file.
        VolumeUnwritable: its folder cannot be written.
    """
    if not path.name or (path.exists() and not path.is_file()):
        raise BadInput(f"{path} is not a file", "a place for a page, or an earlier page's", "--out PAGE.html")
    names = [run.name for run in compared.runs]
    charts = [
        overlay_chart(compared, "val_loss", "Validation loss, nats a token"),
        overlay_chart(compared, "loss", "Training loss, nats a token"),
        overlay_chart(compared, "grad_norm", "Gradient norm, before clipping"),
        overlay_chart(compared, "tokens_per_sec", "Throughput, tokens a second"),
    ]
    charts = [chart for chart in charts if chart.lines]
    none = tag("p", "none")
    body = [
        tag("h1", " · ".join(names)),
        *(tag("p", note, class_="bad") for note in compared.notes),
        section("Curves", plots_html(charts) if charts else tag("p", "No metrics yet.")),
        section("Settings that differ", table_html(names, compared.settings) if compared.settings else none),
        section("Figures", table_html(names, compared.figures)),
        tag("p", f"Written by gpt2box on {time.strftime('%Y-%m-%d at %H:%M')}.", class_="note"),
    ]
    ensure_writable(path.absolute().parent)
    write_atomically(path, render_document(" · ".join(names), *body))


def overlay_chart(compared: Comparison, name: str, title: str) -> Chart:
    """Build a chart of one metric with a line for each run that has it."""
    return Chart(
        title,
        [
            Line(run.name, run.history.curves[name], run.tokens_per_step, name == "val_loss")
            for run in compared.runs
            if name in run.history.curves
        ],
    )


def table_html(names: list[str], rows: Rows) -> str:
    """Render a table with a column for each run."""
    return table(["", *names], ([key, *cells] for key, cells in rows.items()))
