"""`gpt2box runs`: find and list the runs in the volume."""

from collections.abc import Iterator
from pathlib import Path

from gpt2box.errors import BadInput
from gpt2box.runs.formatting import format_count, format_loss, format_step
from gpt2box.runs.view import RunSummary
from gpt2box.utils.files import is_locked
from gpt2box.utils.paths import display_path, list_run_dirs, runs_dir
from gpt2box.utils.progress import format_bytes, format_duration


def find_run(name: str | None) -> Path:
    """Return the folder of the run `name`, or of the newest run.

    Raises BadInput: there is no such run; lists those that exist.
    """
    names = [path.name for path in list_run_folders()]
    if name is None:
        newest = find_newest_run()
        if newest is None:
            raise BadInput(f"no run in {display_path(runs_dir())} yet", "a run", "gpt2box train demo")
        return newest
    if name not in names:
        raise BadInput(f"no run {name!r}", f"one of: {', '.join(sorted(names)) or 'none yet'}", "gpt2box runs")
    return runs_dir() / name


def find_newest_run() -> Path | None:
    """Return the run whose metrics.jsonl changed last."""
    found = [path / "metrics.jsonl" for path in list_run_dirs() if (path / "metrics.jsonl").exists()]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent if newest else None


def list_run_folders() -> list[Path]:
    """Return the folders of all runs."""
    return [path for path in list_run_dirs() if is_run_folder(path)]


def is_run_folder(folder: Path) -> bool:
    """Return True if training has written into the folder, or holds its lock."""
    known = ("config.yaml", "plan.json", "metrics.jsonl", "checkpoints")
    try:
        return any((folder / name).exists() for name in known) or is_locked(folder / ".lock")
    except PermissionError:  # another user's private folder
        return False


def format_table(runs: list[RunSummary]) -> Iterator[str]:
    """Format a table of runs; a damaged run is followed by its fault."""
    head = ["run", "state", "step", "best val_loss", "tokens", "time", "disk"]
    rows = [table_cells(run) for run in runs]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for run, row in zip([None, *runs], [head, *rows], strict=True):
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join([*left, *right]).rstrip()
        if run and run.fault:
            yield f"    {run.fault}"


def table_cells(run: RunSummary) -> list[str]:
    """Format a run as a row of the table."""
    return [
        run.name,
        run.state_label,
        format_step(run.step, run.max_steps),
        "-" if run.best_val_loss is None else format_loss(run.best_val_loss),
        format_count(run.tokens),
        format_duration(run.seconds),
        format_bytes(run.size_bytes),
    ]
