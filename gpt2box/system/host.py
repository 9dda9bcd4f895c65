"""What the machine has besides its GPU: memory, cores, disk, and in what kind of box this process runs."""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2box.errors import MachineCannot

NO_LIMIT = 1 << 60  # what cgroups write where memory is not limited
HOST_OOM_PATTERN = re.compile(r"DefaultCPUAllocator|can't allocate memory|Cannot allocate memory|failed to map segment")


def in_container() -> bool:
    """Whether this process is inside a container."""
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or bool(os.environ.get("GPT2BOX_IMAGE"))


def docker_runtimes() -> list[str] | None:
    """The runtimes of the Docker engine, or None where there is none."""
    try:
        command = ["docker", "info", "--format", "{{json .Runtimes}}"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
        return list(json.loads(answer.stdout)) if answer.returncode == 0 else None
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def is_wsl() -> bool:
    """Whether this is Linux under Windows (WSL), containers there included."""
    return "microsoft" in platform.release().lower()


def cpu_cores() -> float:
    """CPU cores that this process may use: by affinity and by the container's quota."""
    usable = float(len(os.sched_getaffinity(0)))
    quota, period = _read("/sys/fs/cgroup/cpu.max", "max 100000").split()[:2]
    if quota == "max":
        quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
        period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    return min(usable, int(quota) / int(period)) if int(quota) > 0 else usable


def cpu_model() -> str:
    """The processor, as the system names it."""
    lines = _read("/proc/cpuinfo", "").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_name() -> str:
    """The processor, with the threads that PyTorch takes by default."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(wanted) if wanted.isdigit() else len(os.sched_getaffinity(0))
    return f"{' '.join(cpu_model().split())}, {threads} thread{'' if threads == 1 else 's'}"


def memory_bytes() -> tuple[int, int]:
    """Memory in all and available now, within the container's limit."""
    lines = dict(line.split(":", 1) for line in _read("/proc/meminfo", "").splitlines() if ":" in line)
    total, available = (
        int(lines[key].split()[0]) * 1024 if key in lines else 0 for key in ("MemTotal", "MemAvailable")
    )
    limit = _read("/sys/fs/cgroup/memory.max", "") or _read("/sys/fs/cgroup/memory/memory.limit_in_bytes", "max")
    used = _read("/sys/fs/cgroup/memory.current", "") or _read("/sys/fs/cgroup/memory/memory.usage_in_bytes", "0")
    if limit.isdigit() and int(limit) < min(total or NO_LIMIT, NO_LIMIT):
        # What is counted as used holds files that were read and can be dropped at once.
        stat = _read("/sys/fs/cgroup/memory.stat", "") or _read("/sys/fs/cgroup/memory/memory.stat", "")
        counts = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
        dropped = int(counts.get("total_inactive_file") or counts.get("inactive_file") or 0)
        return int(limit), min(available, max(int(limit) - int(used) + dropped, 0))
    return total, available


def shm_bytes() -> int | None:
    """Size of /dev/shm, or None where there is none."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def free_bytes(folder: Path) -> int:
    """Disk space for this user where `folder` is or will be."""
    there = next(part for part in [folder.absolute(), *folder.absolute().parents] if part.exists())
    return shutil.disk_usage(there).free


def is_windows_drive(folder: Path) -> bool:
    """Under WSL, a folder on a Windows drive: many times slower than Linux's own disk."""
    kinds = ("9p", "drvfs", "v9fs")
    best = ("", "")
    for line in _read("/proc/mounts", "").splitlines():
        _, point, kind, *_ = line.split(" ")
        if Path(point) in [folder.absolute(), *folder.absolute().parents] and len(point) > len(best[0]):
            best = (point, kind)
    return best[1] in kinds


def _read(path: str, default: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip() or default
    except OSError:
        return default


def is_host_oom(error: BaseException) -> bool:
    """Whether it says so of this machine's own memory: Python's error, or PyTorch's in words."""
    return isinstance(error, MemoryError) or bool(HOST_OOM_PATTERN.search(str(error)))


@contextmanager
def explain_host_oom(doing: str) -> Iterator[None]:
    """`doing`: what is done, for words.

    Raises MachineCannot: there was not enough of the machine's own memory for it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_host_oom(error):
            raise
        raise host_oom_error(doing) from error


def host_oom_error(doing: str = "") -> MachineCannot:
    """What to say where this machine's own memory ran out."""
    return MachineCannot(
        f"the machine's own memory ran out{f' while {doing}' if doing else ''}",
        "free memory (docs/memory.md)",
        "close other programs, and give the same command again",
    )
