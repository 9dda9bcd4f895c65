"""Query the host: memory, CPU cores, disk, and the kind of system: container, WSL, Docker."""

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

NO_LIMIT = 1 << 60  # cgroup v1 reports a huge number if memory is not limited
HOST_OOM_PATTERN = re.compile(r"DefaultCPUAllocator|can't allocate memory|Cannot allocate memory|failed to map segment")


def in_container() -> bool:
    """Return True inside a container."""
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or bool(os.environ.get("GPT2BOX_IMAGE"))


def docker_runtimes() -> list[str] | None:
    """Return the runtimes of the Docker engine, or None without one."""
    try:
        command = ["docker", "info", "--format", "{{json .Runtimes}}"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
        return list(json.loads(answer.stdout)) if answer.returncode == 0 else None
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def is_wsl() -> bool:
    """Return True on Linux under Windows (WSL), also in a container."""
    return "microsoft" in platform.release().lower()


def cpu_cores() -> float:
    """Return the CPU cores that this process may use, by affinity and the container's quota."""
    usable = float(len(os.sched_getaffinity(0)))
    quota, period = _read("/sys/fs/cgroup/cpu.max", "max 100000").split()[:2]
    if quota == "max":
        quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
        period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    return min(usable, int(quota) / int(period)) if int(quota) > 0 else usable


def cpu_model() -> str:
    """Return the CPU's model name."""
    lines = _read("/proc/cpuinfo", "").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_name() -> str:
    """Return the CPU's model name with PyTorch's default number of threads."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(wanted) if wanted.isdigit() else len(os.sched_getaffinity(0))
    return f"{' '.join(cpu_model().split())}, {threads} thread{'' if threads == 1 else 's'}"


def memory_bytes() -> tuple[int, int]:
    """Return total and available memory in bytes, within the container's limit."""
    lines = dict(line.split(":", 1) for line in _read("/proc/meminfo", "").splitlines() if ":" in line)
    total, available = (
        int(lines[key].split()[0]) * 1024 if key in lines else 0 for key in ("MemTotal", "MemAvailable")
    )
    limit = _read("/sys/fs/cgroup/memory.max", "") or _read("/sys/fs/cgroup/memory/memory.limit_in_bytes", "max")
    used = _read("/sys/fs/cgroup/memory.current", "") or _read("/sys/fs/cgroup/memory/memory.usage_in_bytes", "0")
    if limit.isdigit() and int(limit) < min(total or NO_LIMIT, NO_LIMIT):
        # Used memory includes the page cache, which can be freed at once.
        stat = _read("/sys/fs/cgroup/memory.stat", "") or _read("/sys/fs/cgroup/memory/memory.stat", "")
        counts = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
        dropped = int(counts.get("total_inactive_file") or counts.get("inactive_file") or 0)
        return int(limit), min(available, max(int(limit) - int(used) + dropped, 0))
    return total, available


def shm_bytes() -> int | None:
    """Return the size of /dev/shm in bytes, or None without it."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def free_bytes(folder: Path) -> int:
    """Return the disk space available to this user where `folder` is or will be."""
    there = next(part for part in [folder.absolute(), *folder.absolute().parents] if part.exists())
    return shutil.disk_usage(there).free


def is_windows_drive(folder: Path) -> bool:
    """Return True for a folder on a Windows drive under WSL: many times slower than Linux's own disk."""
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
    """Return True if the host's memory ran out: a MemoryError, or a message of PyTorch that means it."""
    return isinstance(error, MemoryError) or bool(HOST_OOM_PATTERN.search(str(error)))


@contextmanager
def explain_host_oom(doing: str) -> Iterator[None]:
    """Raise MachineCannot in place of a host out-of-memory error. `doing`: the current task, for the message.

    Raises MachineCannot: the host's memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_host_oom(error):
            raise
        raise host_oom_error(doing) from error


def host_oom_error(doing: str = "") -> MachineCannot:
    """Build the error for exhausted host memory."""
    return MachineCannot(
        f"the machine's own memory ran out{f' while {doing}' if doing else ''}",
        "free memory (docs/memory.md)",
        "close other programs, and give the same command again",
    )
