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

WORKSPACE = ":4096:8"  # eight buffers of 4 MiB: of the two settings in cuBLAS's manual, the one without loss of speed


def enable_determinism(compiled: bool) -> None:
    """Make PyTorch deterministic for the rest of this process.

    Call it before the first matrix product on a GPU, when cuBLAS reads its variable. A workspace that the user has set
    is not changed: PyTorch rejects one that is not deterministic, by name.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    # Does what use_deterministic_algorithms does, which in newer versions loads the compiler for seconds.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # nothing reads such
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if compiled:
        disable_kernel_timing()


def disable_kernel_timing() -> None:
    """Stop torch.compile from choosing kernels by timing them.

    Deterministic algorithms alone still time a reduction's block size.
    """
    import torch._inductor.config as inductor

    inductor.dynamic_scale_rblock = False
    if hasattr(inductor, "deterministic"):  # since PyTorch 2.9
        inductor.deterministic = True
    else:  # the decision to pad a matrix to a multiple of 8 is timed, too
        inductor.shape_padding = False
