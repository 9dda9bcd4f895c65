"""Compile requirements/*.in to lock files with hashes: `make lock` (needs uv and the package index).

Locked versions stay as they are where the inputs allow it; `make lock ARGS=--upgrade` takes the newest.

PyTorch for the CPU has two lock files of its own: cpu-torch.lock is the CPU build, which pip finds in PyTorch's
own index or as a wheel on disk; cpu-torch-default.lock is the package index's build, which on Linux needs the CUDA
libraries. One file with both hashes does not work: pip prefers a link whose hash the index states, so it would take
the CUDA build although the CPU wheel is there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
PYTHON_VERSIONS = {"cpu": "3.11", "cu121": "3.10", "cu13x": "3.13", "installer": "3.10", "audit": "3.10"}
# torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl
CPU_TORCH = "torch==2.13.0+cpu --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
TORCH_PACKAGES = re.compile(r"(torch==|cuda-|triton|nvidia-(?!ml-py))")


def compile_requirements(stack: str) -> list[str]:
    """Compile `stack`.in; return one string per package, its hashes included."""
    command = ["uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate"]
    command += ["--python-version", PYTHON_VERSIONS[stack], f"{stack}.in"]
    constraints = ""
    if "--upgrade" not in sys.argv:
        command += ["--constraint", "-"]
        constraints = "\n".join(locked_versions(stack))
    done = subprocess.run(command, cwd=REQUIREMENTS, check=True, input=constraints, stdout=subprocess.PIPE, text=True)
    return re.split(r"\n(?=[a-z])", done.stdout.strip())


def locked_versions(stack: str) -> list[str]:
    """Return the present NAME==VERSION pins of `stack`."""
    lines = [line for path in REQUIREMENTS.glob(f"{stack}*.lock") for line in path.read_text().splitlines()]
    return [line.split()[0].replace("+cpu", "") for line in lines if "==" in line]


def write_lock(name: str, packages: list[str]) -> None:
    """Write the lock file `name` with a header."""
    (REQUIREMENTS / name).write_text("\n".join(["# Written by `make lock`; do not edit.", *packages]) + "\n")


def main() -> None:
    """Write all lock files."""
    for stack in ("cu121", "cu13x", "installer", "audit"):
        write_lock(f"{stack}.lock", compile_requirements(stack))
    packages = compile_requirements("cpu")
    write_lock("cpu.lock", [package for package in packages if not TORCH_PACKAGES.match(package)])
    write_lock("cpu-torch.lock", [CPU_TORCH])
    write_lock("cpu-torch-default.lock", [package for package in packages if TORCH_PACKAGES.match(package)])


if __name__ == "__main__":
    main()
