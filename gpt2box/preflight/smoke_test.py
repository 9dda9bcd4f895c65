"""Test PyTorch in a separate process, because a broken driver may crash or hang it.

python -m gpt2box.preflight.smoke_test DEVICE COMPILE one JSON object a line, each as soon as it is known
"""

import json
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

TIMEOUT_S = 300.0  # the first compilation on a slow machine takes a minute
DYING_S = 5.0


def probe(device: str, compile_model: bool) -> dict[str, Any]:
    """Run the test process and return its results; `fault` is set if it did not finish. Never raises."""
    command = [sys.executable, "-W", "ignore", "-m", "gpt2box.preflight.smoke_test", device, str(compile_model)]
    output, problem = "", ""
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    try:
        output, errors = child.communicate(timeout=TIMEOUT_S)
        if child.returncode:
            last = [line for line in errors.splitlines() if line.strip()][-1:]
            problem = f"ended with status {child.returncode}" + (f": {last[0].strip()}" if last else "")
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else (expired.stdout or "")
        problem = f"did not answer within {TIMEOUT_S:.0f} seconds"
    finally:
        if child.poll() is None:
            child.kill()
            with suppress(subprocess.TimeoutExpired):  # a process that waits for a hung driver cannot be killed
                child.wait(DYING_S)
    facts: dict[str, Any] = {"fault": problem}
    for line in output.splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
    return facts


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message; PyTorch's messages are pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def look(device: str, compile_model: bool) -> None:
    """Import PyTorch, multiply matrices, then compile a function; print each result."""
    import torch

    import gpt2box.system.device  # noqa: F401, sets what training sets before CUDA starts

    tell(torch=torch.__version__, cuda=torch.version.cuda)
    if device.startswith("cuda"):
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except Exception as error:
            tell(cuda_error=first_line(error))
            return
        index = torch.device(device).index or 0
        if index >= torch.cuda.device_count():
            tell(cuda_error=f"PyTorch sees {torch.cuda.device_count()} cards, none with the number {index}")
            return
        tell(architectures=torch.cuda.get_arch_list(), capability=torch.cuda.get_device_capability(index))
    try:
        tell(bf16_error=multiply(device))
    except Exception as error:
        tell(bf16_fault=first_line(error))
    if compile_model:
        begin = time.monotonic()
        try:
            tell(compile_error=compiled_difference(device), compile_seconds=round(time.monotonic() - begin, 1))
        except Exception as error:
            tell(compile_fault=first_line(error))


def multiply(device: str) -> float:
    """Return the largest error of a bfloat16 matrix product, relative to the largest value.

    The reference is float64 on the CPU.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator).bfloat16() for _ in range(2))
    right = a.double() @ b.double()
    product = (a.to(device) @ b.to(device)).double().cpu()
    return float((product - right).abs().max() / right.abs().max())


def compiled_difference(device: str) -> float:
    """Return the largest difference between the compiled and the eager gradient of a small function."""
    import torch
    from torch.nn import functional

    def function(x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(functional.layer_norm(x, (64,)) @ x.t(), approximate="tanh").sum()

    results = []
    for call in (function, torch.compile(function)):
        x = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64).requires_grad_()
        call(x).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        results.append(x.grad)
    return float((results[0] - results[1]).abs().max())


if __name__ == "__main__":
    look(sys.argv[1], sys.argv[2] == "True")
