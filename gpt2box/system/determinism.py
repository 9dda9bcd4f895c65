"""The same bits each time: what PyTorch must be told, and what its kernels then do.

On a CPU this costs nothing: for a given number of threads its kernels add in one order anyway. On a GPU, all of it
**not verified on a GPU**:
    attention     the flash and memory-efficient backward passes add each query's gradient in one order, in place of
                  atomic additions, when strict determinism is asked for (PyTorch's pull requests 101847 and 182551)
    embedding     rows of equal ids are sorted and added in that order, in place of atomic additions
    cuBLAS        gives the same sums with a fixed workspace (its manual, "Results reproducibility")
    torch.compile takes no kernel by timing it, as it does otherwise, for another block size adds in another order
An operation that has no such form raises an error, which says so; none of the network's should.
"""

import os

import torch

WORKSPACE = ":4096:8"  # eight buffers of 4 MiB, of those that cuBLAS's manual names the one that costs no time


def enable_determinism(compiled: bool) -> None:
    """For the rest of this process. Before the first product on a GPU: cuBLAS reads its variable only then.

    A workspace that the user has set stays: PyTorch refuses one that is not deterministic, by name.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    # The same switch as use_deterministic_algorithms, which in newer versions loads the compiler, seconds of it.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # nothing reads such
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if compiled:
        disable_kernel_timing()


def disable_kernel_timing() -> None:
    """In torch.compile. Deterministic algorithms alone leave it a choice by time of a reduction's block size."""
    import torch._inductor.config as inductor

    inductor.dynamic_scale_rblock = False
    if hasattr(inductor, "deterministic"):  # since PyTorch 2.9
        inductor.deterministic = True
    else:  # whether a matrix is padded to a multiple of 8 is measured, too
        inductor.shape_padding = False
