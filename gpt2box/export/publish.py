"""Write an export under a temporary name, verify it, and rename it to its final name only then."""

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from gpt2box.errors import BadInput, Damaged, VolumeUnwritable
from gpt2box.utils.files import fsync_dir, remove_path
from gpt2box.utils.paths import writable_hint

MIN_NORMAL_FLOAT16 = 2**-14  # below it float16 numbers are evenly spaced, so the rounding error stops shrinking


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` create a file or folder beside `path`, sync it, and rename it to `path`.

    Raises:
        BadInput: `path` exists already.
        VolumeUnwritable: There is no space or no permission.
    """
    if os.path.lexists(path):
        raise BadInput(f"{path} is there already", "a new name", "--out ANOTHER, or move it away")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_path(temporary)
        write(temporary)
        for written in [*temporary.rglob("*"), temporary]:  # files before their folder
            fsync_dir(written)
        os.rename(temporary, path)
        fsync_dir(path.parent)
    except OSError as error:
        found = f"cannot write {path}: {error.strerror or error}"
        raise VolumeUnwritable(found, "free space and permission", writable_hint(path.parent)) from error
    finally:
        remove_path(temporary)


def check_tensors(expected: dict[str, Tensor], stored: dict[str, Tensor], rounding: float, path: Path) -> None:
    """Compare tensors read back from `path` with the originals, up to a relative rounding error.

    Raises Damaged: a tensor is missing or differs by more.
    """
    for name, tensor in expected.items():
        other = stored.get(name)
        if other is None or other.shape != tensor.shape:
            raise Damaged(f"{path}: {name} was not written", f"a tensor {list(tensor.shape)}")
        tolerance = rounding * tensor.abs().clamp(min=MIN_NORMAL_FLOAT16)
        if not ((tensor - other.float()).abs() <= tolerance).all():
            raise Damaged(f"{path}: {name} is not what was written", "the same numbers", "try again on another disk")
