"""What the NVIDIA driver says of its cards, through NVML: no CUDA context, no torch, a few milliseconds.

Everything may be missing: the library, the driver, a card, or one figure of it (`None` then).
Cards are numbered as NVML does, by PCI bus; device.py makes CUDA number them the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BFLOAT16_CAPABILITY = (8, 0)  # compute capability from which bfloat16 is computed in hardware


@dataclass(frozen=True)
class GpuProcess:
    """A program that holds memory of a card. `used_bytes` is unknown on some systems."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True)
class Card:
    """A GPU, or a MIG slice of one."""

    index: int
    name: str
    uuid: str
    capability: tuple[int, int] | None
    total_bytes: int | None
    free_bytes: int | None
    processes: tuple[GpuProcess, ...]
    temperature_c: int | None
    slowdown_c: int | None
    power_w: float | None
    power_limit_w: float | None
    power_default_w: float | None
    pcie_width: int | None
    pcie_max_width: int | None
    busy_percent: int | None
    is_mig: bool = False


@dataclass(frozen=True)
class Nvml:
    """The driver's answer. `fault` says in words why there is none."""

    driver: str = ""
    cuda: tuple[int, int] | None = None  # the newest CUDA that the driver runs
    cards: list[Card] = field(default_factory=list)
    fault: str = ""


def ask_driver() -> Nvml:
    """The driver's version and the cards that this process may use. Never raises."""
    try:
        import pynvml
    except ImportError as error:
        return Nvml(fault=f"nvidia-ml-py is not installed ({error})")
    try:
        pynvml.nvmlInit()
    except Exception as error:  # a broken library can answer anything
        return Nvml(fault=fault_in_words(error))
    try:
        number = ask(pynvml.nvmlSystemGetCudaDriverVersion)
        cuda = (number // 1000, number % 1000 // 10) if number else None
        version = ask(pynvml.nvmlSystemGetDriverVersion) or ""
        found: list[Card] = []
        for index in range(ask(pynvml.nvmlDeviceGetCount) or 0):
            handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            if handle is not None:
                found += read_card(handle, index)
        return Nvml(version, cuda, visible(found, os.environ.get("CUDA_VISIBLE_DEVICES")))
    finally:
        ask(pynvml.nvmlShutdown)


def card_of(device: str) -> Card | None:
    """What the driver says of the card that PyTorch calls `cuda` or `cuda:N`."""
    kind, _, number = device.partition(":")
    cards = ask_driver().cards if kind == "cuda" else []
    return cards[int(number or 0)] if len(cards) > int(number or 0) else None


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers, or None where it does not."""
    try:
        return function(*arguments)
    except Exception:  # NVMLError of some kind, or a missing function of an old or broken driver
        return None


def fault_in_words(error: Exception) -> str:
    """Why NVML did not start."""
    kind = type(error).__name__.removeprefix("NVMLError_")
    known = {
        "LibraryNotFound": "no NVIDIA driver: libnvidia-ml.so.1 is not here",
        "DriverNotLoaded": "the NVIDIA driver is installed but not loaded",
        "LibRmVersionMismatch": "the NVIDIA driver was updated and not yet loaded anew (reboot)",
        "NoPermission": "no permission to talk to the NVIDIA driver",
    }
    return known.get(kind, f"the NVIDIA driver does not answer: {error}")


def read_card(handle: Any, index: int) -> list[Card]:
    """The card, or its slices where it is in MIG mode."""
    import pynvml as n

    mode = ask(n.nvmlDeviceGetMigMode, handle)
    if not (mode and mode[0]):
        return [describe(handle, handle, index)]
    slices = range(ask(n.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
    handles = [ask(n.nvmlDeviceGetMigDeviceHandleByIndex, handle, number) for number in slices]
    return [describe(part, handle, index) for part in handles if part is not None]


def describe(handle: Any, parent: Any, index: int) -> Card:
    """All figures of a card or slice; a slice has its parent's temperature, power and capability."""
    import pynvml as n

    memory = ask(n.nvmlDeviceGetMemoryInfo, handle)
    capability = ask(n.nvmlDeviceGetCudaComputeCapability, parent)
    watts = [
        value / 1000 if value else None
        for value in (
            ask(n.nvmlDeviceGetPowerUsage, parent),
            ask(n.nvmlDeviceGetEnforcedPowerLimit, parent),
            ask(n.nvmlDeviceGetPowerManagementDefaultLimit, parent),
        )
    ]
    return Card(
        index=index,
        name=ask(n.nvmlDeviceGetName, handle) or "unknown card",
        uuid=ask(n.nvmlDeviceGetUUID, handle) or "",
        capability=tuple(capability) if capability else None,
        total_bytes=memory.total if memory else None,
        free_bytes=memory.free if memory else None,
        processes=processes(handle),
        temperature_c=ask(n.nvmlDeviceGetTemperature, parent, n.NVML_TEMPERATURE_GPU),
        slowdown_c=ask(n.nvmlDeviceGetTemperatureThreshold, parent, n.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
        power_w=watts[0],
        power_limit_w=watts[1],
        power_default_w=watts[2],
        pcie_width=ask(n.nvmlDeviceGetCurrPcieLinkWidth, parent),
        pcie_max_width=ask(n.nvmlDeviceGetMaxPcieLinkWidth, parent),
        busy_percent=busy.gpu if (busy := ask(n.nvmlDeviceGetUtilizationRates, parent)) else None,
        is_mig=handle is not parent,
    )


def processes(handle: Any) -> tuple[GpuProcess, ...]:
    """Who holds the card's memory, most first. In a container only those that the driver shows to it."""
    import pynvml as n

    found: dict[int, int | None] = {}
    for question in (n.nvmlDeviceGetComputeRunningProcesses, n.nvmlDeviceGetGraphicsRunningProcesses):
        for process in ask(question, handle) or []:
            used = process.usedGpuMemory
            found[process.pid] = max(found.get(process.pid) or 0, used) if used is not None else found.get(process.pid)
    listed = [GpuProcess(pid, process_name(pid), used) for pid, used in found.items()]
    return tuple(sorted(listed, key=lambda process: -(process.used_bytes or 0)))


def process_name(pid: int) -> str:
    """A program's name, or its number where it belongs to another user or container."""
    import pynvml as n

    path = ask(n.nvmlSystemGetProcessName, pid)
    if not path:
        try:
            path = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            path = ""
    return Path(path.split(" ")[0]).name or f"process {pid}"


def visible(cards: list[Card], selection: str | None) -> list[Card]:
    """The cards that CUDA_VISIBLE_DEVICES leaves, in its order; as CUDA does, up to the first that is not there."""
    if selection is None:
        return cards
    chosen = []
    for word in (part.strip() for part in selection.split(",")):
        match = [card for card in cards if word == str(card.index) or (len(word) > 4 and card.uuid.startswith(word))]
        if not match or match[0] in chosen:
            break
        chosen.append(match[0])
    return chosen
