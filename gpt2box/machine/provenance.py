"""What a run was made with: versions, code, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import gpt2box

PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "click", "pydantic")
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")


def provenance(device: str) -> dict[str, Any]:
    """For a run's manifest.json. `device` in words."""
    return {
        "gpt2box": gpt2box.__version__,
        "git": git_state(),
        "image": os.environ.get("GPT2BOX_IMAGE", ""),  # stack, version, revision and the lock's sha256
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def git_state() -> str:
    """The revision of a source checkout, with `+changes` for uncommitted ones; empty elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        revision, changes = (
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision.strip() + ("+changes" if changes.strip() else "")
