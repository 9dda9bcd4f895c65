"""`gpt2box runs --compare`: what runs differ in, in settings and in outcome, and their curves over each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.errors import BadInput
from gpt2box.report.html import Chart, Line, plots_html, render_document, section, table, tag
from gpt2box.report.page import mapping, read_settings
from gpt2box.runs.history import History, read_history
from gpt2box.runs.listing import RunSummary, format_count
from gpt2box.runs.plan_file import read_plan
from gpt2box.utils.files import read_object, whole, write_atomically
from gpt2box.utils.paths import make_writable, run_dir
from gpt2box.utils.progress import duration, size

Rows = dict[str, list[str]]  # by name, a cell for each run
UNKNOWN = "-"


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    runs: list[RunSummary]
    settings: Rows  # those that differ
    figures: Rows
    notes: list[str]  # what does not compare
    histories: list[History]
    tokens_per_step: list[int]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        names = [run.name for run in self.runs]
        differing = {key: dict(zip(names, values, strict=True)) for key, values in self.settings.items()}
        return {"settings": differing, "runs": [run.as_dict() for run in self.runs], "notes": self.notes}

    def lines(self) -> Iterator[str]:
        """For a terminal."""
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


def compare_runs(runs: list[RunSummary]) -> Comparison:
    """Read what there is to compare. Nothing is refused: what is missing or damaged is a dash."""
    places = [run_dir(run.name) for run in runs]
    histories = [read_history(place / "metrics.jsonl") for place in places]
    tokens = [whole(read_plan(place).get("tokens_per_step")) for place in places]
    settings = differing_settings([read_settings(place) for place in places])
    return Comparison(
        runs, settings, key_figures(runs, histories), comparison_warnings(places, histories), histories, tokens
    )


def differing_settings(settings: list[dict[str, Any]]) -> Rows:
    """The settings that are not the same in all, but for the runs' names."""
    keys = dict.fromkeys(key for each in settings for key in each if key != "name")
    rows = {key: [str(each.get(key, UNKNOWN)) for each in settings] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def key_figures(runs: list[RunSummary], histories: list[History]) -> Rows:
    """How far, how good, how fast."""
    rows: list[list[str]] = []
    for run, past in zip(runs, histories, strict=True):
        value = {name: curve.value for name, curve in past.curves.items()}
        best = past.best()
        rows.append(
            [
                run.words(),
                f"{run.step:,} of {run.max_steps:,}",
                f"{best[0]:.4f}" if best else UNKNOWN,
                f"{best[1]:,}" if best else UNKNOWN,
                f"{value['loss'][-1]:.4f}" if "loss" in value else UNKNOWN,
                format_count(run.tokens),
                duration(run.seconds),
                f"{np.median(value['tokens_per_sec']):,.0f}" if "tokens_per_sec" in value else UNKNOWN,
                size(float(value["peak_memory_bytes"].max())) if "peak_memory_bytes" in value else UNKNOWN,
                size(run.size_bytes),
            ]
        )
    names = ["state", "step", "best val_loss", "at step", "last train loss", "tokens seen", "time in training"]
    names += ["tokens a second", "most memory", "on disk"]
    return {name: list(cells) for name, cells in zip(names, zip(*rows, strict=True), strict=True)}


def comparison_warnings(places: list[Path], histories: list[History]) -> list[str]:
    """Why figures of these runs may not compare."""
    notes = []
    sets = {past.val_sets[-1] for past in histories if past.val_sets}
    if len(sets) > 1:
        notes.append(f"val_loss does not compare: it is over different validation windows ({', '.join(sorted(sets))})")
    trained = []
    for place in places:
        dataset = mapping(read_object(place / "manifest.json").get("dataset"))
        trained.append(mapping(mapping(dataset.get("splits")).get("train")).get("sha256"))
    if len({digest for digest in trained if digest}) > 1:
        notes.append("they were trained on different texts")
    return notes


def write_comparison(compared: Comparison, path: Path) -> None:
    """The same as a page, with the curves of all runs over each other.

    Raises:
        BadInput: it is not a file's place.
        VolumeUnwritable: no page can be written there.
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
        section("Curves", plots_html(charts) if charts else tag("p", "Not one figure has been noted yet.")),
        section("Settings that differ", table_html(names, compared.settings) if compared.settings else none),
        section("Figures", table_html(names, compared.figures)),
        tag("p", f"Written by gpt2box on {time.strftime('%Y-%m-%d at %H:%M')}.", class_="note"),
    ]
    make_writable(path.absolute().parent)
    write_atomically(path, render_document(" · ".join(names), *body))


def overlay_chart(compared: Comparison, name: str, title: str) -> Chart:
    """A chart with a curve for each run that has one."""
    runs = zip(compared.runs, compared.histories, compared.tokens_per_step, strict=True)
    lines = [
        Line(run.name, past.curves[name], tokens, name == "val_loss")
        for run, past, tokens in runs
        if name in past.curves
    ]
    return Chart(title, lines)


def table_html(names: list[str], rows: Rows) -> str:
    """A column for each run."""
    return table(["", *names], ([key, *cells] for key, cells in rows.items()))
