"""Files as others may have left them: none that ends in a wait, and none that is ever seen half-written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2box.errors import BadInput


def regular(path: str | Path, flags: int) -> int:
    """An opener for `open`: a pipe or a device in a file's place would be waited for, or read without end, and to write
    where a link leads would be to write anywhere.

    Raises:
        OSError: it is one, or as the system says.
    """
    if flags & (os.O_WRONLY | os.O_RDWR):
        flags |= os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)  # to open a pipe would be to wait for its other end
    except OSError as error:
        if error.errno != errno.ENXIO:  # a pipe that nobody reads, or a socket
            raise
        raise not_a_file(path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_a_file(path)
    return descriptor


def not_a_file(path: str | Path) -> OSError:
    """What the system might say of it."""
    return OSError(errno.EINVAL, "not a file", str(path))


def check_regular(path: Path) -> None:
    """Before a library opens it.

    Raises:
        OSError: see `regular`.
    """
    os.close(regular(path, os.O_RDONLY))


def read_text(path: Path) -> str:
    """All of a file.

    Raises:
        OSError: see `regular`.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open(path, encoding="utf-8", opener=regular) as file:
        return file.read()


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: see `regular`.
        ValueError: it is no JSON in UTF-8; or see `parse_json`.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """As json.loads, but that nothing in it is of no use to anyone, and some things would end in other errors later.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has a number of more than 300 digits.
    """
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def whole(value: object) -> int:
    """A count from a file; 0 for what is no number, or none that a run could have."""
    return int(value) if isinstance(value, int | float) and abs(value) < 2**63 else 0


def _whole(digits: str) -> int:
    if len(digits) > 300:  # no float
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; nothing where it is missing, unreadable or no object."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the system frees it with the process, however that ends.

    Raises:
        BadInput: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # it may have been is_locked, which holds it for an instant
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise BadInput(
            f"{what} by another process", next_step="wait for it, stop it, or choose another --name"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file, of this container or another. It only reads."""
    try:
        descriptor = regular(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def fsync_dir(folder: Path) -> None:
    """Make a rename in `folder` durable (a file's own fsync does not cover its directory entry)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """A folder with what is in it, or a file, where it is there; of a link itself alone: it may lead to what someone
    moved to another disk.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Replace `path` with a text, its parts, or bytes; a reader or a crash sees the old content or the new, never half.

    A link that lies there is replaced, not followed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            file.writelines(part.encode("utf-8") for part in ([content] if isinstance(content, str) else content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_dir(path.parent)
