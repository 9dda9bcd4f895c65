"""What the dashboard shows, as JSON: all runs, the cards, one run's figures, curves, samples and log. It only reads.

A page asks again and again; it says what it has (`Known`) and gets what is new.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2box.report.html import chart_data
from gpt2box.report.page import build_charts, read_sample_excerpt, sample_title
from gpt2box.runs.history import MAX_CURVE_POINTS
from gpt2box.runs.listing import RunSummary, format_count, list_run_folders, summarize_run, table_cells
from gpt2box.runs.metrics import parse_rows, skip_reason
from gpt2box.runs.plan_file import read_plan
from gpt2box.runs.tail import MetricsTail, read_tail
from gpt2box.system.gpu import Card, Nvml, ask_driver
from gpt2box.utils.files import is_locked, whole
from gpt2box.utils.paths import run_dir
from gpt2box.utils.progress import duration, size

GPU_QUERY_SECONDS = 2.0  # between questions to the driver
MAX_FOLLOWED_RUNS = 4  # runs whose curves are kept in memory: 56 MB for a million points
LOG_BYTES = 8192  # of the log's end
SILENCE_NOTICE_SECONDS = 120  # without a figure, after which that is said


@dataclass(frozen=True)
class ClientState:
    """What a page has already; empty where it has nothing."""

    run: str = ""  # that it shows; the one that is being trained, else the newest, where it has not chosen
    curves: str = ""
    log: str = ""
    samples: str = ""
    sample: str = ""  # that the reader has chosen; the newest where none is


class DashboardState:
    """Remembers what it has read, so that the next answer is quick. May be asked from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[object, RunSummary]] = {}
        self._followers: OrderedDict[str, MetricsTail] = OrderedDict()
        self._nvml, self._asked = Nvml(), -GPU_QUERY_SECONDS

    def now(self, known: ClientState) -> dict[str, Any]:
        """All that is new to a page."""
        with self._lock:
            runs = self.runs()
            run = next((run for run in runs if run.name == known.run), None if known.run else next(iter(runs), None))
            answer = {"runs": [run_row(each) for each in runs], "cards": self.cards(), "run": None}
            if run is not None:
                with suppress(OSError):  # it was removed just now
                    answer["run"] = self.of_run(run, known)
            return answer

    def runs(self) -> list[RunSummary]:
        """Those that are being trained first, then the newest; one that did not change is not looked at again."""
        found = {}
        for folder in list_run_folders():
            try:
                mark = run_stamp(folder)
                kept = self._seen.get(folder.name)
                found[folder.name] = kept if kept and kept[0] == mark else (mark, summarize_run(folder))
            except (OSError, ValueError):  # as above, or nothing that can be read
                continue
        self._seen = found
        return sorted((run for _, run in found.values()), key=lambda run: (run.state != "training", -run.changed))

    def cards(self) -> dict[str, Any]:
        """What the driver says, which is not asked for every page."""
        if time.monotonic() - self._asked >= GPU_QUERY_SECONDS:
            self._nvml, self._asked = ask_driver(), time.monotonic()
        return {"fault": self._nvml.fault, "cards": [gpu_figures(card) for card in self._nvml.cards]}

    def of_run(self, run: RunSummary, known: ClientState) -> dict[str, Any]:
        """One run in full."""
        folder = run_dir(run.name)
        plan = read_plan(folder)
        log = folder / "log.txt"
        of_log = file_stamp(log)
        return {
            **run_row(run),
            "progress": min(run.step / run.max_steps, 1.0) if run.max_steps else 0.0,
            "figures": run_figures(run, folder, plan),
            "curves": self.curves(folder, known.curves, whole(plan.get("tokens_per_step"))),
            "log": None if of_log == known.log else {"version": of_log, "text": read_tail(log, LOG_BYTES)},
            "samples": read_samples(folder, known),
        }

    def curves(self, folder: Path, cursor: str, tokens_per_step: int) -> dict[str, Any]:
        """The points after `cursor`, where that is of the same file and not long ago; else whole curves, thinned."""
        follower = self._followers.setdefault(folder.name, MetricsTail(folder / "metrics.jsonl"))
        self._followers.move_to_end(folder.name)
        if len(self._followers) > MAX_FOLLOWED_RUNS:
            self._followers.popitem(last=False)
        follower.read_on()
        counts = follower.figures.counts()
        generation = follower.generation
        if follower.share < 1 and cursor.startswith(generation + ":"):  # a long file: its curves once it is read
            return {"version": cursor, "whole": False, "read": follower.share, "charts": []}
        since = parse_cursor(cursor, generation, counts)
        history = follower.figures.history(since or [0] * len(counts))
        return {
            "version": ":".join([generation, *map(str, counts)]),
            "whole": since is None,
            "read": follower.share,
            "charts": [chart_data(chart) for chart in build_charts(history, tokens_per_step)],
        }


def parse_cursor(cursor: str, generation: str, counts: list[int]) -> list[int] | None:
    """The counts that a cursor stands for, where what came since is worth adding to it."""
    begun, *numbers = cursor.split(":")
    if begun != generation or len(numbers) != len(counts) or not all(number.isdecimal() for number in numbers):
        return None
    since = [int(number) for number in numbers]
    few = all(0 <= count - had <= MAX_CURVE_POINTS for had, count in zip(since, counts, strict=True))
    return since if few else None


def run_stamp(folder: Path) -> object:
    """Something that is another once the run is."""
    names = ("", "metrics.jsonl", "plan.json", "config.yaml", "checkpoints", "samples")
    return [is_locked(folder / ".lock"), *(file_stamp(folder / name) for name in names)]


def file_stamp(path: Path) -> str:
    """The same for a file or folder."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return "none"
    return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"


def run_row(run: RunSummary) -> dict[str, Any]:
    """A run in the list."""
    return {"name": run.name, "state": run.state, "fault": run.fault, "cells": table_cells(run)[1:]}


def run_figures(run: RunSummary, folder: Path, plan: dict[str, Any]) -> list[tuple[str, str]]:
    """How it stands, by name: the last line of each kind, and what follows from it."""
    last: dict[str, dict[str, Any]] = {}
    for line in parse_rows(read_tail(folder / "metrics.jsonl").splitlines()):
        last[line["kind"]] = line
    train, evaluated = last.get("train", {}), last.get("eval", {})
    pace = row_number(train, "tokens_per_sec")
    left = max(run.max_steps - run.step, 0) * whole(plan.get("tokens_per_step"))
    found = [("step", f"{run.step:,} of {run.max_steps:,}" if run.max_steps else f"{run.step:,}")]
    if run.state == "training" and pace and left:
        found.append(("time left", duration(left / pace)))
    if train:
        loss = row_number(train, "loss")
        found.append(("loss", "not finite" if loss is None else f"{loss:.4f}"))
    if (val_loss := row_number(evaluated, "val_loss")) is not None:
        found.append(("val_loss", f"{val_loss:.4f}"))
    if run.best_val_loss is not None:
        found.append(("best val_loss", f"{run.best_val_loss:.4f} at {run.best_step or 0:,}"))
    if pace is not None:
        found.append(("speed", f"{pace:,.0f} tokens/s"))
    mfu, peak = row_number(train, "mfu"), row_number(plan, "peak_tflops")
    if mfu is not None and peak:
        found.append(("MFU", f"{mfu:.0%} of {peak:g} TFLOPS"))
    for name, title in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")):
        if (value := row_number(train, name)) is not None:
            found.append((title, f"{value:.3g}"))
    if (memory := row_number(train, "peak_memory_bytes")) is not None:
        found.append(("most memory", size(memory)))
    if skipped := whole(train.get("skipped_steps")):
        found.append(("steps left out", f"{skipped:,}: {skip_reason(skipped, whole(train.get('loss_spikes')))}"))
    found.append(("tokens seen", format_count(run.tokens)))
    silent = time.time() - max((row_number(line, "time") or 0.0 for line in last.values()), default=time.time())
    if run.state == "training" and silent > SILENCE_NOTICE_SECONDS:
        found.append(("last figure", f"{duration(silent)} ago"))
    return found


def row_number(row: dict[str, Any], name: str) -> float | None:
    """A figure that is one."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None


def read_samples(folder: Path, known: ClientState) -> dict[str, Any] | None:
    """The names of the run's samples, the newest first, and the text of one; nothing where the page has them."""
    place = folder / "samples"
    version = f"{file_stamp(place)}-{known.sample}"
    if version == known.samples:
        return None
    steps = sorted(place.glob("step-*.txt"), reverse=True)
    others = [path for name in ("best", "before-after") if (path := place / f"{name}.txt").exists()]
    listed = {path.stem: path for path in [*steps, *others]}
    chosen = known.sample if known.sample in listed else next(iter(listed), "")
    return {
        "version": version,
        "names": [(name, sample_title(path)) for name, path in listed.items()],
        "chosen": chosen,
        "text": read_sample_excerpt(listed[chosen]) if chosen else "",
    }


def gpu_figures(card: Card) -> dict[str, Any]:
    """A card's figures, as far as the driver tells them, and who holds its memory."""
    known = card.total_bytes is not None and card.free_bytes is not None
    used = (card.total_bytes or 0) - (card.free_bytes or 0)
    limit = f" of {card.power_limit_w:.0f} W" if card.power_limit_w else ""
    rows = [
        ("memory", f"{used / 2**30:.1f} of {(card.total_bytes or 0) / 2**30:.1f} GiB" if known else ""),
        ("busy", f"{card.busy_percent}%" if card.busy_percent is not None else ""),
        ("temperature", f"{card.temperature_c} °C" if card.temperature_c is not None else ""),
        ("power", f"{card.power_w:.0f} W{limit}" if card.power_w is not None else ""),
    ]
    return {
        "name": card.name,
        "used": used / card.total_bytes if known and card.total_bytes else 0.0,
        "figures": [(name, text) for name, text in rows if text],
        "processes": [
            (each.name, str(each.pid), "not told" if each.used_bytes is None else size(each.used_bytes))
            for each in card.processes
        ],
    }
