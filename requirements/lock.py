"""Write the lock files from the .in files: `make lock` (needs uv and the package index).

Versions that are locked stay as they are, where they can; `make lock ARGS=--upgrade` takes the newest.

cpu.lock holds all but PyTorch, which comes in two builds: the CPU build where pip finds it
(PyTorch's own index, or a wheel on disk), else the index's default, which on Linux brings CUDA
libraries along. Two files and not one with both hashes: pip prefers a link whose hash the index
states, so it would take the CUDA build though the CPU wheel lies on the disk.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PYTHON = {"cpu": "3.11", "cu121": "3.10", "cu13x": "3.13", "installer": "3.10", "audit": "3.10"}
# torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl
CPU_TORCH = "torch==2.13.0+cpu --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
TORCH = re.compile(r"(torch==|cuda-|triton|nvidia-(?!ml-py))")


def compile_lock(stack: str) -> list[str]:
    """The locked requirements of a stack, one string per package with its hashes."""
    command = ["uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate"]
    command += ["--python-version", PYTHON[stack], f"{stack}.in"]
    locked = [
        line.split()[0]
        for path in HERE.glob(f"{stack}*.lock")
        for line in path.read_text().splitlines()
        if "==" in line
    ]
    if "--upgrade" not in sys.argv:
        kept = HERE / f".{stack}-kept.txt"
        kept.write_text("\n".join(line.replace("+cpu", "") for line in locked))
        command += ["--constraint", kept.name]
    text = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout
    (HERE / f".{stack}-kept.txt").unlink(missing_ok=True)
    return re.split(r"\n(?=[a-z])", text.strip())


def write(name: str, packages: list[str]) -> None:
    header = "# Written by `make lock`; do not edit.\n"
    (HERE / name).write_text(header + "\n".join(packages) + "\n")


def main() -> None:
    for stack in ("cu121", "cu13x", "installer", "audit"):
        write(f"{stack}.lock", compile_lock(stack))
    packages = compile_lock("cpu")
    write("cpu.lock", [p for p in packages if not TORCH.match(p)])
    write("cpu-torch.lock", [CPU_TORCH])
    write("cpu-torch-default.lock", [p for p in packages if TORCH.match(p)])


if __name__ == "__main__":
    main()
