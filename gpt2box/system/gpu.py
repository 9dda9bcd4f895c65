"""Query GPUs from the NVIDIA driver through NVML: no CUDA context, no torch, a few milliseconds.

The library, the driver, the GPU or one of its figures (then `None`) may be missing. GPUs are numbered as NVML does, by
PCI bus; device.py makes CUDA number them the same way.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BFLOAT16_CAPABILITY = (8, 0)  # compute capability from which bfloat16 is computed in hardware


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds GPU memory. `used_bytes` is unknown on some systems."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True)
class Gpu:
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
    """The driver's answer; `fault` describes why there is none."""

    driver: str = ""
    cuda: tuple[int, int] | None = None  # the newest CUDA version that the driver supports
    gpus: list[Gpu] = field(default_factory=list)
    fault: str = ""


def query_nvml() -> Nvml:
    """Query the driver's version and the GPUs that this process may use. Never raises."""
    try:
        import pynvml
    except ImportError as error:
        return Nvml(fault=f"nvidia-ml-py is not installed ({error})")
    try:
        pynvml.nvmlInit()
    except Exception as error:  # a broken library may raise anything
        return Nvml(fault=describe_nvml_error(error))
    try:
        number = call_or_none(pynvml.nvmlSystemGetCudaDriverVersion)
        cuda = (number // 1000, number % 1000 // 10) if number else None
        version = call_or_none(pynvml.nvmlSystemGetDriverVersion) or ""
        found: list[Gpu] = []
        for index in range(call_or_none(pynvml.nvmlDeviceGetCount) or 0):
            handle = call_or_none(pynvml.nvmlDeviceGetHandleByIndex, index)
            if handle is not None:
                found += read_gpus(handle, index)
        return Nvml(version, cuda, filter_visible(found, os.environ.get("CUDA_VISIBLE_DEVICES")))
    finally:
        call_or_none(pynvml.nvmlShutdown)


def find_gpu(device: str) -> Gpu | None:
    """Return the GPU that PyTorch calls `cuda` or `cuda:N`; None if NVML does not report it."""
    kind, _, number = device.partition(":")
    cards = query_nvml().gpus if kind == "cuda" else []
    return cards[int(number or 0)] if len(cards) > int(number or 0) else None


def call_or_none(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call an NVML function; return None if it fails."""
    try:
        return function(*arguments)
    except Exception:  # NVMLError of some kind, or a missing function of an old or broken driver
        return None


def describe_nvml_error(error: Exception) -> str:
    """Describe why NVML did not start."""
    kind = type(error).__name__.removeprefix("NVMLError_")
    known = {
        "LibraryNotFound": "no NVIDIA driver: libnvidia-ml.so.1 is not here",
        "DriverNotLoaded": "the NVIDIA driver is installed but not loaded",
        "LibRmVersionMismatch": "the NVIDIA driver was updated and not yet loaded anew (reboot)",
        "NoPermission": "no permission to talk to the NVIDIA driver",
    }
    return known.get(kind, f"the NVIDIA driver does not answer: {error}")


def read_gpus(handle: Any, index: int) -> list[Gpu]:
    """Read a GPU, or its slices in MIG mode."""
    import pynvml as n

    mode = call_or_none(n.nvmlDeviceGetMigMode, handle)
    if not (mode and mode[0]):
        return [read_gpu_or_slice(handle, handle, index)]
    slices = range(call_or_none(n.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
    handles = [call_or_none(n.nvmlDeviceGetMigDeviceHandleByIndex, handle, number) for number in slices]
    return [read_gpu_or_slice(part, handle, index) for part in handles if part is not None]


def read_gpu_or_slice(handle: Any, parent: Any, index: int) -> Gpu:
    """Read all figures of a GPU or slice; a slice has its parent's temperature, power and capability."""
    import pynvml as n

    memory = call_or_none(n.nvmlDeviceGetMemoryInfo, handle)
    capability = call_or_none(n.nvmlDeviceGetCudaComputeCapability, parent)
    watts = [
        value / 1000 if value else None
        for value in (
            call_or_none(n.nvmlDeviceGetPowerUsage, parent),
            call_or_none(n.nvmlDeviceGetEnforcedPowerLimit, parent),
            call_or_none(n.nvmlDeviceGetPowerManagementDefaultLimit, parent),
        )
    ]
    return Gpu(
        index=index,
        name=call_or_none(n.nvmlDeviceGetName, handle) or "unknown card",
        uuid=call_or_none(n.nvmlDeviceGetUUID, handle) or "",
        capability=tuple(capability) if capability else None,
        total_bytes=memory.total if memory else None,
        free_bytes=memory.free if memory else None,
        processes=gpu_processes(handle),
        temperature_c=call_or_none(n.nvmlDeviceGetTemperature, parent, n.NVML_TEMPERATURE_GPU),
        slowdown_c=call_or_none(n.nvmlDeviceGetTemperatureThreshold, parent, n.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
        power_w=watts[0],
        power_limit_w=watts[1],
        power_default_w=watts[2],
        pcie_width=call_or_none(n.nvmlDeviceGetCurrPcieLinkWidth, parent),
        pcie_max_width=call_or_none(n.nvmlDeviceGetMaxPcieLinkWidth, parent),
        busy_percent=busy.gpu if (busy := call_or_none(n.nvmlDeviceGetUtilizationRates, parent)) else None,
        is_mig=handle is not parent,
    )


def gpu_processes(handle: Any) -> tuple[GpuProcess, ...]:
    """List the processes that hold the GPU's memory, largest first.

    In a container the driver shows only some of them.
    """
    import pynvml as n

    found: dict[int, int | None] = {}
    for question in (n.nvmlDeviceGetComputeRunningProcesses, n.nvmlDeviceGetGraphicsRunningProcesses):
        for process in call_or_none(question, handle) or []:
            used = process.usedGpuMemory
            found[process.pid] = max(found.get(process.pid) or 0, used) if used is not None else found.get(process.pid)
    listed = [GpuProcess(pid, process_name(pid), used) for pid, used in found.items()]
    return tuple(sorted(listed, key=lambda process: -(process.used_bytes or 0)))


def process_name(pid: int) -> str:
    """Return a process's name, or its number if it belongs to another user or container."""
    import pynvml as n

    path = call_or_none(n.nvmlSystemGetProcessName, pid)
    if not path:
        try:
            path = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            path = ""
    return Path(path.split(" ")[0]).name or f"process {pid}"


def filter_visible(cards: list[Gpu], selection: str | None) -> list[Gpu]:
    """Return the GPUs in CUDA_VISIBLE_DEVICES, in its order. Like CUDA, stop at the first that does not exist."""
    if selection is None:
        return cards
    chosen = []
    for word in (part.strip() for part in selection.split(",")):
        match = [card for card in cards if word == str(card.index) or (len(word) > 4 and card.uuid.startswith(word))]
        if not match or match[0] in chosen:
            break
        chosen.append(match[0])
    return chosen
