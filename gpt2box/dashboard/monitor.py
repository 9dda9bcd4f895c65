"""`gpt2box monitor`: show GPUs and a run in a second terminal or container. It only reads."""

import sys
import time
from collections.abc import Iterator

from gpt2box.runs.listing import find_newest_run, find_run
from gpt2box.runs.view import RunView
from gpt2box.system.gpu import Gpu, query_nvml
from gpt2box.utils.paths import runs_dir
from gpt2box.utils.progress import LINE_SECONDS

REFRESH_SECONDS = 2.0


def monitor(name: str | None, once: bool) -> None:
    """Show GPUs and the run `name` until interrupted: in place on a terminal, otherwise as repeated lines.

    Raises BadInput: there is no such run.
    """
    if name is not None:
        find_run(name)
    if once:
        print("\n".join(status_lines(name)))
    elif sys.stdout.isatty():
        from rich.live import Live
        from rich.text import Text

        with Live(refresh_per_second=4) as live:
            while True:
                live.update(Text("\n".join(status_lines(name))))
                time.sleep(REFRESH_SECONDS)
    else:
        while True:
            print("\n".join(status_lines(name)), flush=True)
            time.sleep(LINE_SECONDS)


def status_lines(name: str | None) -> Iterator[str]:
    """Format a line for each GPU, then one for the run."""
    nvml = query_nvml()
    if nvml.fault:
        yield f"no GPU: {nvml.fault}"
    yield from (format_gpu(gpu) for gpu in nvml.gpus)
    folder = runs_dir() / name if name else find_newest_run()
    yield RunView(folder).status_line() if folder and folder.is_dir() else f"no run in {runs_dir()} yet"


def format_gpu(gpu: Gpu) -> str:
    """Format a GPU's figures on one line."""
    return "  ".join([gpu.name, *(f"{text} busy" if name == "busy" else text for name, text in gpu_figures(gpu))])


def gpu_figures(gpu: Gpu) -> list[tuple[str, str]]:
    """Format what the driver reports of a GPU, by name."""
    limit = f" of {gpu.power_limit_w:.0f} W" if gpu.power_limit_w else ""
    figures = []
    if gpu.total_bytes is not None and gpu.free_bytes is not None:
        used = gpu.total_bytes - gpu.free_bytes
        figures.append(("memory", f"{used / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB"))
    if gpu.busy_percent is not None:
        figures.append(("busy", f"{gpu.busy_percent}%"))
    if gpu.temperature_c is not None:
        figures.append(("temperature", f"{gpu.temperature_c} °C"))
    if gpu.power_w is not None:
        figures.append(("power", f"{gpu.power_w:.0f} W{limit}"))
    return figures
