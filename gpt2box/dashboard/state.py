"""The dashboard's state as JSON: all runs, the GPUs, and one run's figures, curves, samples and log. It only reads.

A page polls: it sends the versions that it has (`ClientState`) and receives what is new.
"""

import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2box.dashboard.monitor import gpu_figures
from gpt2box.report.html import chart_data
from gpt2box.report.page import build_charts, read_sample_excerpt, sample_title
from gpt2box.runs.history import MAX_CURVE_POINTS, MetricsTail
from gpt2box.runs.listing import list_run_folders, table_cells
from gpt2box.runs.metrics import read_tail
from gpt2box.runs.view import RunSummary, RunView
from gpt2box.system.gpu import Gpu, Nvml, query_nvml
from gpt2box.utils.files import is_locked
from gpt2box.utils.progress import format_bytes

GPU_QUERY_SECONDS = 2.0  # between queries of the driver
MAX_FOLLOWED_RUNS = 4  # whose curves are kept in memory: 56 MB for a million points
LOG_BYTES = 8192  # of the log's end


@dataclass(frozen=True)
class ClientState:
    """The versions of what a page has; empty where it has nothing."""

    run: str = ""  # the chosen run; if empty, the server picks one in training, else the newest
    curves: str = ""
    log: str = ""
    samples: str = ""
    sample: str = ""  # the chosen sample; if empty, the newest


class DashboardState:
    """Answers polls, and caches what it has read. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._views: dict[str, tuple[object, RunView]] = {}
        self._tails: OrderedDict[str, MetricsTail] = OrderedDict()
        self._nvml, self._queried_at = Nvml(), -GPU_QUERY_SECONDS

    def updates(self, client: ClientState) -> dict[str, Any]:
        """Return all that is new to a page."""
        with self._lock:
            views = self.list_views()
            view = next((view for view in views if client.run in ("", view.name)), None)
            answer = {"runs": [run_row(each.summary) for each in views], "cards": self.read_gpus(), "run": None}
            if view is not None:
                with suppress(OSError):  # the run was removed just now
                    answer["run"] = self.describe_run(view, client)
            return answer

    def list_views(self) -> list[RunView]:
        """Return all runs: those in training first, then by age. Unchanged runs are not read again."""
        views = {}
        for folder in list_run_folders():
            try:
                stamp = run_stamp(folder)
                cached = self._views.get(folder.name)
                view = cached[1] if cached and cached[0] == stamp else RunView(folder)
                if view.summary:  # reads the files, and may fail
                    views[folder.name] = (stamp, view)
            except (OSError, ValueError):  # removed just now, or unreadable
                continue
        self._views = views
        return sorted(
            (view for _, view in views.values()),
            key=lambda view: (view.summary.state != "training", -view.summary.changed),
        )

    def read_gpus(self) -> dict[str, Any]:
        """Return what the driver reports, at most GPU_QUERY_SECONDS old."""
        if time.monotonic() - self._queried_at >= GPU_QUERY_SECONDS:
            self._nvml, self._queried_at = query_nvml(), time.monotonic()
        return {"fault": self._nvml.fault, "cards": [gpu_row(gpu) for gpu in self._nvml.gpus]}

    def describe_run(self, view: RunView, client: ClientState) -> dict[str, Any]:
        """Return one run in full."""
        run, log = view.summary, view.folder / "log.txt"
        log_version = file_stamp(log)
        return {
            **run_row(run),
            "progress": min(run.step / run.max_steps, 1.0) if run.max_steps else 0.0,
            "figures": list(view.figures().items()),
            "curves": self.read_curves(view, client.curves),
            "log": None if log_version == client.log else {"version": log_version, "text": read_tail(log, LOG_BYTES)},
            "samples": read_samples(view.folder, client),
        }

    def read_curves(self, view: RunView, cursor: str) -> dict[str, Any]:
        """Return the points after `cursor` if it is of this file and recent; else all curves, downsampled."""
        tail = self._tails.setdefault(view.name, MetricsTail(view.folder / "metrics.jsonl"))
        self._tails.move_to_end(view.name)
        if len(self._tails) > MAX_FOLLOWED_RUNS:
            self._tails.popitem(last=False)
        tail.read_new_rows()
        counts = tail.buffer.row_counts()
        generation, fraction_read = tail.generation, tail.fraction_read
        if fraction_read < 1 and cursor.startswith(generation + ":"):  # a long file: send its curves once it is read
            return {"version": cursor, "whole": False, "read": fraction_read, "charts": []}
        start_rows = parse_cursor(cursor, generation, counts)
        history = tail.buffer.to_history(start_rows or [0] * len(counts))
        return {
            "version": ":".join([generation, *map(str, counts)]),
            "whole": start_rows is None,
            "read": fraction_read,
            "charts": [chart_data(chart) for chart in build_charts(history, view.tokens_per_step)],
        }


def parse_cursor(cursor: str, generation: str, counts: list[int]) -> list[int] | None:
    """Return a cursor's row counts; None if it is of another file or too many rows came since."""
    cursor_generation, *numbers = cursor.split(":")
    if cursor_generation != generation or len(numbers) != len(counts) or not all(map(str.isdecimal, numbers)):
        return None
    start_rows = [int(number) for number in numbers]
    is_recent = all(0 <= count - start <= MAX_CURVE_POINTS for start, count in zip(start_rows, counts, strict=True))
    return start_rows if is_recent else None


def run_stamp(folder: Path) -> object:
    """Return a value that changes whenever the run does."""
    names = ("", "metrics.jsonl", "plan.json", "config.yaml", "checkpoints", "samples")
    return [is_locked(folder / ".lock"), *(file_stamp(folder / name) for name in names)]


def file_stamp(path: Path) -> str:
    """Return a value that changes whenever the file or folder does."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return "none"
    return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"


def run_row(run: RunSummary) -> dict[str, Any]:
    """Return a run's row of the list."""
    return {"name": run.name, "state": run.state, "fault": run.fault, "cells": table_cells(run)[1:]}


def read_samples(folder: Path, client: ClientState) -> dict[str, Any] | None:
    """Return the names of the samples, newest first, and one text; None if the page has them."""
    version = f"{file_stamp(folder / 'samples')}-{client.sample}"
    if version == client.samples:
        return None
    steps = sorted((folder / "samples").glob("step-*.txt"), reverse=True)
    others = [path for name in ("best", "before-after") if (path := folder / "samples" / f"{name}.txt").exists()]
    listed = {path.stem: path for path in [*steps, *others]}
    chosen = client.sample if client.sample in listed else next(iter(listed), "")
    return {
        "version": version,
        "names": [(name, sample_title(path)) for name, path in listed.items()],
        "chosen": chosen,
        "text": read_sample_excerpt(listed[chosen]) if chosen else "",
    }


def gpu_row(gpu: Gpu) -> dict[str, Any]:
    """Return a GPU's figures, and the processes that hold its memory."""
    used = 0.0
    if gpu.total_bytes and gpu.free_bytes is not None:
        used = (gpu.total_bytes - gpu.free_bytes) / gpu.total_bytes
    return {
        "name": gpu.name,
        "used": used,
        "figures": gpu_figures(gpu),
        "processes": [
            (each.name, str(each.pid), "not told" if each.used_bytes is None else format_bytes(each.used_bytes))
            for each in gpu.processes
        ],
    }
