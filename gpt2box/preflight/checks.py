"""Turn facts into findings: passed, warning or failure, and the fix. This module gathers no facts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from gpt2box.system.gpu import BFLOAT16_CAPABILITY, Gpu, Nvml
from gpt2box.utils.progress import format_bytes

# The oldest Linux driver that runs any program built for this CUDA major version, and the card generations it
# has code for (CUDA's release notes, "minor version compatibility").
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
CU13_ONLY = (10, 0)  # compute capability from which CUDA 12.1 has no code
HOT_C = 83  # temperature in °C at which GeForce GPUs begin to slow down
GIB = 2**30
FLOAT32_INSTEAD = "training uses float32 here: more memory, slower"


@dataclass(frozen=True)
class Finding:
    """The result of one check. `fix` is the next thing to do after a warning or failure."""

    name: str
    status: Literal["ok", "warning", "failure"]
    found: str
    fix: str = ""


def driver(nvml: Nvml, cuda: str | None, in_container: bool, is_wsl: bool) -> Finding:
    """Check the driver against the CUDA version (such as 12.1) that PyTorch was built for."""
    if nvml.fault:
        if in_container and "libnvidia-ml" in nvml.fault:
            fix = "start the container with --gpus all (the NVIDIA Container Toolkit must be installed on the host)"
        elif is_wsl:
            fix = "install NVIDIA's driver in Windows (none inside WSL), then: wsl --shutdown"
        else:
            fix = "install NVIDIA's driver and reboot: nvidia-smi must list the card"
        return Finding("driver", "failure", nvml.fault, f"{fix}; or --device cpu")
    runs = f", runs CUDA up to {nvml.cuda[0]}.{nvml.cuda[1]}" if nvml.cuda else ""
    if not cuda:
        return Finding("driver", "ok", f"{nvml.driver or 'of unknown version'}{runs}")
    needed = int(cuda.split(".")[0])
    found = f"{nvml.driver}{runs}; this PyTorch is built for CUDA {cuda}"
    if nvml.cuda and nvml.cuda[0] < needed:
        older = all(found.capability and found.capability < CU13_ONLY for found in nvml.gpus)
        other = "; or the image for older drivers: STACK=cu121" if needed > 12 and nvml.cuda[0] == 12 and older else ""
        return Finding("driver", "failure", found, f"install driver {OLDEST_DRIVER[needed]} or newer{other}")
    return Finding("driver", "ok", found)


def card(nvml: Nvml, index: int, in_container: bool) -> Finding:
    """Check that a GPU with this number exists."""
    listed = "; ".join(f"{number}: {found.name}" for number, found in enumerate(nvml.gpus)) or "none"
    if index >= len(nvml.gpus):
        bring = "start with --gpus all" if in_container else "a card that nvidia-smi lists, or --device cpu"
        fix = "the device of a card that is listed, such as --device cuda:0" if nvml.gpus else bring
        return Finding("card", "failure", f"no card with the number {index}; listed: {listed}", fix)
    note = ", a MIG slice" if nvml.gpus[index].is_mig else ""
    return Finding("card", "ok", nvml.gpus[index].name + note)


def architecture(capability: tuple[int, int] | None, built_for: list[str], cuda: str | None) -> Finding:
    """Check that PyTorch has code for the GPU: binary code for its generation, or PTX for it or an older one."""
    if capability is None or not built_for:
        return Finding("architecture", "warning", "unknown", "the card's compute capability was not told")
    name = f"compute capability {capability[0]}.{capability[1]}"
    if runs_on(capability, built_for):
        return Finding("architecture", "ok", name)
    found = f"{name}; this PyTorch (CUDA {cuda}) has code for {' '.join(built_for)}"
    newest = max(number(entry) for entry in built_for)
    if capability > newest:
        fix = "the image for newer cards: STACK=cu13x in .env"
    elif (cuda or "").startswith("13"):
        fix = "the image for older cards: STACK=cu121 in .env"
    else:
        fix = "a newer card, or --device cpu"
    return Finding("architecture", "failure", found, fix)


def number(architecture_name: str) -> tuple[int, int]:
    """Parse sm_86 into (8, 6)."""
    digits = "".join(c for c in architecture_name.split("_")[-1] if c.isdigit())
    return int(digits[:-1]), int(digits[-1])


def runs_on(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Apply CUDA's rule: sm_XY runs on X.Z with Z ≥ Y, compute_XY (PTX) on every capability from X.Y on."""
    for entry in built_for:
        own = number(entry)
        if entry.startswith("compute_") and own <= capability:
            return True
        if own[0] == capability[0] and own[1] <= capability[1]:
            return True
    return False


def vram(found: Gpu) -> Finding:
    """Report total and free GPU memory, and the processes that hold the rest."""
    if found.total_bytes is None or found.free_bytes is None:
        return Finding("vram", "warning", "the driver does not tell", "watch nvidia-smi while training")
    taken = found.total_bytes - found.free_bytes
    text = f"{format_bytes(found.free_bytes)} free of {format_bytes(found.total_bytes)}"
    holders = [
        f"{process.name} {format_bytes(process.used_bytes) if process.used_bytes else ''}".strip()
        for process in found.processes[:4]
    ]
    if holders:
        text += f"; held by {', '.join(holders)}" + (" and others" if len(found.processes) > 4 else "")
    elif taken > found.total_bytes * 0.05:
        text += "; held by programs outside this container, such as the desktop"
    if taken > found.total_bytes * 0.15:
        return Finding("vram", "warning", text, "close what is not needed; a browser and a desktop hold 1 to 3 GiB")
    return Finding("vram", "ok", text)


def health(found: Gpu) -> Iterator[Finding]:
    """Check temperature, power limit and PCIe link, which can slow a GPU down."""
    if found.temperature_c is not None:
        hot = found.temperature_c >= min(HOT_C, (found.slowdown_c or 200) - 5)
        yield Finding(
            "temperature",
            "warning" if hot else "ok",
            f"{found.temperature_c} °C",
            "better cooling: it runs slower when hot" if hot else "",
        )
    if found.power_limit_w:
        lowered = found.power_default_w and found.power_limit_w < 0.8 * found.power_default_w
        usual = f", usually {found.power_default_w:.0f} W" if lowered and found.power_default_w else ""
        yield Finding(
            "power",
            "warning" if lowered else "ok",
            f"limited to {found.power_limit_w:.0f} W{usual}",
            f"sudo nvidia-smi -pl {found.power_default_w:.0f}, unless it is meant" if lowered else "",
        )
    if found.pcie_width and found.pcie_max_width:
        narrow = found.pcie_width < min(4, found.pcie_max_width)
        yield Finding(
            "pcie",
            "warning" if narrow else "ok",
            f"x{found.pcie_width} of x{found.pcie_max_width}",
            "another slot or no riser: checkpoints are slow to save" if narrow else "",
        )


def bfloat16(facts: dict[str, Any], capability: tuple[int, int] | None, on_gpu: bool, wanted: bool) -> Finding:
    """Check the measured error of a bfloat16 product. A GPU without bfloat16 passes unless the job needs it."""
    old = capability if on_gpu and capability and capability < BFLOAT16_CAPABILITY else None
    if old and not wanted and "bf16_fault" in facts:
        found = f"none: compute capability {old[0]}.{old[1]}"
        return Finding("bfloat16", "warning", found, FLOAT32_INSTEAD)
    if fault := facts.get("bf16_fault"):
        return Finding("bfloat16", "failure", fault, "see the driver and the architecture above")
    if "bf16_error" not in facts:
        return Finding("bfloat16", "failure", facts.get("fault") or "not computed", "see PyTorch's own failure above")
    error = facts["bf16_error"]
    if error > 0.02:  # rounding to bfloat16 alone is 2^-9
        found = f"a product of bfloat16 matrices is wrong by {error:.0%}"
        return Finding("bfloat16", "failure", found, "a defective card or memory: try again, then another card")
    if old:
        found = f"computed, but slowly: compute capability {old[0]}.{old[1]}"
        return Finding("bfloat16", "warning", found, FLOAT32_INSTEAD)
    return Finding("bfloat16", "ok", f"a product was computed, right to {error:.1%}")


def pytorch(facts: dict[str, Any]) -> Finding:
    """Check that PyTorch imports, and uses the GPU if the job needs one."""
    version = facts.get("torch")
    if not version:
        return Finding("pytorch", "failure", facts.get("fault") or "gave no answer", "build or install anew")
    if fault := facts.get("cuda_error"):
        fix = "see the driver above" if facts.get("cuda") else "a build of PyTorch for CUDA: the image has one"
        return Finding("pytorch", "failure", f"{version}: {fault}", fix)
    if fault := facts.get("fault"):
        return Finding("pytorch", "failure", f"{version}: {fault}", "nvidia-smi; a reboot if it hangs, too")
    return Finding("pytorch", "ok", version)


def compiler(facts: dict[str, Any]) -> Finding | None:
    """Check torch.compile if training would use it, because training would fail only minutes later."""
    fix = "--compile false: slower, and more memory"
    if fault := facts.get("compile_fault"):
        return Finding("torch.compile", "failure", fault, fix)
    if "compile_error" not in facts:
        return None
    if facts["compile_error"] > 0.01:
        return Finding("torch.compile", "failure", f"a compiled gradient differs by {facts['compile_error']:.2g}", fix)
    return Finding("torch.compile", "ok", f"a small function compiled in {facts['compile_seconds']:.0f} s")


def runtime(docker_runtimes: list[str] | None) -> Finding:
    """Check, on the host, that containers can use the GPU."""
    if docker_runtimes is None:
        return Finding("container", "ok", "no Docker here; not in a container")
    if "nvidia" not in docker_runtimes:
        fix = "for containers: install the NVIDIA Container Toolkit (docs/containers.md)"
        return Finding("container", "warning", f"Docker's runtimes: {', '.join(docker_runtimes)}", fix)
    return Finding("container", "ok", "Docker has the NVIDIA runtime; not in a container")


def dataset(name: str, there: bool, source: str) -> Finding:
    """Check that the dataset exists or can be made."""
    if there or source:
        return Finding("dataset", "ok", f"{name}: {'there' if there else f'to be made from {source}'}")
    fix = "gpt2box prepare TEXT, or nanoGPT's train.bin and val.bin in its folder"
    return Finding("dataset", "failure", f"no dataset {name}", fix)


def memory(total: int, available: int, needed: int) -> Finding:
    """Check main memory against what the job needs."""
    found = f"{format_bytes(available)} free of {format_bytes(total)}"
    if available < needed:
        fix = "close programs, or raise the container's or WSL's memory limit"
        return Finding("memory", "warning", f"{found}; the job wants about {format_bytes(needed)}", fix)
    return Finding("memory", "ok", found)


def cpu(cores: float) -> Finding:
    """Check CPU cores: one is enough for training on a GPU, but preparing OpenWebText needs more."""
    if cores < 2:
        return Finding(
            "cores", "warning", f"{cores:g}", "2 or more: one prepares batches while the other drives the GPU"
        )
    return Finding("cores", "ok", f"{cores:g}")


def shared_memory(total: int | None) -> Finding:
    """Check /dev/shm, which NCCL and worker processes use; training on one GPU does not."""
    if total is None or total < 64 << 20:
        found = "none" if total is None else format_bytes(total)
        return Finding("/dev/shm", "warning", found, "--shm-size 1g, for more than one GPU")
    return Finding("/dev/shm", "ok", format_bytes(total))


def disk(volumes: str, free: int, needed: int, what: str) -> Finding:
    """Check the free space of a disk against what the job writes to its volumes."""
    found = f"{format_bytes(free)} free for {volumes}" + (
        f"; the job writes {format_bytes(needed)} ({what})" if needed else ""
    )
    if free < needed:
        return Finding("disk", "failure", found, "free space, or GPT2BOX_VOLUMES on a larger disk")
    if free < needed + GIB:
        return Finding("disk", "warning", found, "free some space: it will be nearly full")
    return Finding("disk", "ok", found)
