"""Translate operating system and CUDA errors into expected failures.

Errors that only a bug can cause stay as they are.
"""

import errno
import os
import sys

from gpt2box.errors import BadInput, Gpt2boxError, MachineCannot, VolumeUnwritable

# Error numbers of a failing or removed disk or network share.
DISK_FAULTS = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO, errno.ESHUTDOWN)
# Error numbers of exceeded system limits, with `expected` and `next_step`.
OPEN_FILES = ("fewer open files", "ulimit -n 4096, and the same command again")
LIMITS = {
    errno.EMFILE: OPEN_FILES,
    errno.ENFILE: OPEN_FILES,
    errno.EAGAIN: ("room for another process", "close other programs, or raise the limits (ulimit -a)"),
}


def explain_os_error(error: OSError) -> Gpt2boxError | None:
    """Return the expected failure for an operating system error, or None if only a bug can cause it."""
    what = f"{error.filename or 'a file'}: {error.strerror}"
    names = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
    if error.errno in names or (error.errno == errno.EINVAL and error.filename):
        return BadInput(f"cannot use {what}", "a file where a file belongs, a folder where a folder does")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return VolumeUnwritable(f"cannot write {what}", "free space on a disk that may be written")
    if error.errno in (errno.EACCES, errno.EPERM):
        return VolumeUnwritable(f"cannot open {what}", f"permission for uid {os.getuid()}")
    if error.errno == errno.EFBIG:
        return VolumeUnwritable(f"cannot write {what}", "a file system and a limit (ulimit -f) for files of that size")
    if error.errno in DISK_FAULTS:
        return VolumeUnwritable(f"cannot read or write {what}", "a disk that works; the system's log may say more")
    if error.errno in LIMITS:
        return MachineCannot(f"the system refuses: {what}", *LIMITS[error.errno])
    return None


def explain_cuda_oom(error: Exception) -> Gpt2boxError | None:
    """Return the expected failure for a CUDA out-of-memory error, or None for any other error."""
    if "gpt2box.system.device" in sys.modules:  # without torch no GPU was used
        import torch

        from gpt2box.system.device import CUDA_OOM_PATTERN

        if isinstance(error, torch.cuda.OutOfMemoryError) or CUDA_OOM_PATTERN.search(str(error)):
            return MachineCannot(
                "out of memory on the card",
                "free memory of the card",
                "close other programs on it (gpt2box monitor), or --device cpu",
            )
    return None
