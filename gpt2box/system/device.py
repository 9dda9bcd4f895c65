"""Choose the device, dtype and compiler; measure peak memory; recognize CUDA errors that mean out of memory."""

import importlib.util
import os
import re
import resource
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gpt2box.config.schema import DEVICE_PATTERN
from gpt2box.errors import BadInput, MachineCannot
from gpt2box.system.gpu import BFLOAT16_CAPABILITY
from gpt2box.system.host import is_wsl
from gpt2box.utils.progress import pluralize

# CUDA reads this when it starts. It numbers GPUs like NVML; by default CUDA puts the fastest first.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
# One growing segment in place of many fixed ones, so that what is planned fits without gaps. The name changed in 2.9.
# Not on WSL2, where some cards' drivers before R615 refuse the first piece of memory then (PyTorch's issue 192330).
IS_TORCH_2_9 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
if not is_wsl():
    os.environ.setdefault(
        "PYTORCH_ALLOC_CONF" if IS_TORCH_2_9 else "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
    )
# Messages of cuBLAS, cuDNN, CUDA, its driver, Triton, NCCL and the kernel autotuner.
CUDA_OOM_PATTERN = re.compile(
    r".*(CU(BLAS|DNN)_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED when calling .?cublasCreate|"
    r"(CUDA( driver)? error|Triton Error \[CUDA\]|OutOfMemoryError): (CUDA )?out of memory|"
    r"Cuda failure .*out of memory).*"
)


def choose_device(wanted: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`.

    A GPU is returned with its number, which mem_get_info and set_device of PyTorch 2.4 require.

    Raises:
        BadInput: none of these.
        MachineCannot: no such GPU.
    """
    if not re.fullmatch(DEVICE_PATTERN, wanted):
        raise BadInput(f"device {wanted!r}", "auto, cpu, cuda or cuda:N")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(wanted.partition(":")[2] or 0))
    if device.index >= torch.cuda.device_count():
        raise MachineCannot(
            f"device {wanted}: PyTorch sees {torch.cuda.device_count()} GPUs",
            "an NVIDIA GPU with its driver (nvidia-smi lists it)",
            "--device cpu, or in a container: --gpus all",
        )
    return device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the requested dtype; by default bfloat16 on a GPU that supports it in hardware, else float32."""
    if wanted == "auto":
        # Compare the capability: torch.cuda.is_bf16_supported() also returns True for slow emulation on older GPUs.
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[wanted]


def choose_compile(wanted: bool | str, device: torch.device) -> tuple[bool, str]:
    """Return True if torch.compile is used, and a message if a compiler is missing."""
    if wanted is False or (wanted == "auto" and device.type == "cpu"):
        return False, ""
    missing = [] if shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc") else ["a C compiler (gcc)"]
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing.append("Triton")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        missing.append("a GPU of compute capability 7.0 or more")
    if device.type == "cuda" and not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append("Python's headers (python3-dev)")
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        missing = ["a C++ compiler (g++)"]
    if missing:
        return False, f"torch.compile needs {' and '.join(missing)}, not found here: going on without it, slower"
    return True, ""


@contextmanager
def translate_cuda_oom() -> Iterator[None]:
    """Convert out-of-memory errors of cuBLAS, Triton and CUDA to the error that PyTorch's allocator raises.

    cuBLAS allocates memory when it is first used, which may be in the first backward pass (PyTorch's issue 128601).

    Raises torch.cuda.OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        said = CUDA_OOM_PATTERN.search(str(error))
        if isinstance(error, torch.cuda.OutOfMemoryError) or not said:
            raise
        raise torch.cuda.OutOfMemoryError(said[0].strip()) from None


def describe_device(device: torch.device) -> str:
    """Return the GPU's or CPU's name, for messages."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return f"CPU, {pluralize(torch.get_num_threads(), 'thread')}"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: reserved on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
