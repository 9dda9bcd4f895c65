"""What CUDA and its libraries say when a card fails or its memory runs out, as PyTorch 2.4 and 2.13 hand it on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt2box.errors import TryAgain
from gpt2box.system.device import choose_device, translate_cuda_oom
from gpt2box.training.rollback import machine_error

ASYNC = """
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
"""
ADVICE = ASYNC + "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"  # as 2.4 ends all of them


def fault_of(text: str, folder: Path) -> object:
    job: Any = SimpleNamespace(run=folder, state=SimpleNamespace(step=4))
    return machine_error(RuntimeError(text), job)


@pytest.mark.parametrize("tail", [ASYNC, ADVICE])
@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: unspecified launch failure",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: no CUDA-capable device is detected",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "CUDA error: unknown error",
        "NCCL error in: ../NCCLUtils.hpp:268, unhandled cuda error, NCCL version 2.20.5\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 'unspecified launch failure'",
    ],
)
def test_a_card_that_failed_is_said(tmp_path: Path, said: str, tail: str) -> None:
    fault = fault_of(said + tail, tmp_path)
    assert isinstance(fault, TryAgain) and fault.found == f"the GPU failed in step 5: {said.splitlines()[0]}"


@pytest.mark.parametrize(("wanted", "number"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_card_has_its_number(wanted: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """mem_get_info and set_device of PyTorch 2.4 refuse a device without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(wanted) == torch.device("cuda", number)


@pytest.mark.parametrize("tail", [ASYNC, ADVICE])
@pytest.mark.parametrize(
    "said", ["out of memory", "invalid argument", "no kernel image is available for execution on the device"]
)
def test_what_is_no_failure_of_the_card_is_not_called_one(tmp_path: Path, said: str, tail: str) -> None:
    assert fault_of(f"CUDA error: {said}{tail}", tmp_path) is None


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory" + ADVICE,
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
        "NCCL error in: ../NCCLUtils.hpp:268, unhandled cuda error, NCCL version 2.20.5\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_memory_that_a_library_misses_is_memory_that_ran_out(said: str) -> None:
    said_so = r"ALLOC_FAILED|cublasCreate|out of memory"
    with pytest.raises(torch.cuda.OutOfMemoryError, match=said_so), translate_cuda_oom():
        raise RuntimeError(said)
    for other in (RuntimeError("CUDA error: invalid argument"), torch.cuda.OutOfMemoryError("CUDA out of memory.")):
        with pytest.raises(type(other)) as raised, translate_cuda_oom():
            raise other
        assert raised.value is other
