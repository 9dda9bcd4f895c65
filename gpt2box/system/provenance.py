"""Collect what a run was made with: versions, code and machine.

Each fact is listed by name, so no secret can be included.
"""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import gpt2box
from gpt2box.system import host
from gpt2box.system.device import describe_device
from gpt2box.system.gpu import query_nvml

ROOT = Path(__file__).resolve().parents[2]
STACKS = ("cpu", "cu121", "cu13x")
PACKAGES = ("torch", "triton", "numpy", "tiktoken", "safetensors", "click", "pydantic")
# Variables that change numbers or kernels. None holds a secret; HF_TOKEN and similar ones are not read.
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCHINDUCTOR_MAX_AUTOTUNE", "TORCHINDUCTOR_DETERMINISTIC", "NCCL_ALGO", "NCCL_PROTO",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip


def collect_provenance(device: torch.device) -> dict[str, Any]:
    """Return the facts that manifest.json records for a session."""
    return {
        "gpt2box": gpt2box.__version__,
        "git": git_state(),
        "image": os.environ.get("GPT2BOX_IMAGE", ""),  # stack, version, revision and the lock's sha256
        "locks": lock_file_hashes(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": describe_device(device),
        "gpu": describe_gpu(device),
        "cpu": cpu_facts(),
        "packages": package_versions(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def git_state() -> str:
    """Return the git revision of a source checkout, with `+changes` if uncommitted; empty without a checkout."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        revision, changes = (
            subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision.strip() + ("+changes" if changes.strip() else "")


def lock_file_hashes() -> dict[str, str]:
    """Return the sha256 of each stack's concatenated lock files (see scripts/compose.sh); in an image, only its own."""
    image = os.environ.get("GPT2BOX_IMAGE", "").split()
    if len(image) == 4:
        return {image[0]: image[3]}
    found = {}
    for stack in STACKS:
        if locks := sorted((ROOT / "requirements").glob(f"{stack}*.lock")):
            found[stack] = hashlib.sha256(b"".join(path.read_bytes() for path in locks)).hexdigest()
    return found


def package_versions() -> dict[str, str]:
    """Return the versions of packages that affect the numbers, and one sha256 over all installed names and versions."""
    every = {
        (each.metadata["Name"] or "").lower(): each.version
        for each in importlib.metadata.distributions()
        # torch.compile imports setuptools, which adds its vendored packages to the path until the process ends
        if "_vendor" not in Path(str(each.locate_file(""))).parts
    }
    listed = "".join(f"{name}=={version}\n" for name, version in sorted(every.items()))
    chosen = {name: every[name] for name in PACKAGES if name in every}
    chosen["torch"] = str(torch.__version__)  # with its build, such as +cu121
    return {**chosen, "all_sha256": hashlib.sha256(listed.encode()).hexdigest()}


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Return the GPU, its driver and libraries; empty on a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": query_nvml().driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def cpu_facts() -> dict[str, Any]:
    """Return the CPU, the instruction set that PyTorch uses, and the number of threads."""
    return {
        "model": host.cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": host.cpu_cores(),
        "threads": torch.get_num_threads(),
    }
