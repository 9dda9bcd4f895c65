"""Read and write files robustly: never block on a pipe or device, never leave a half-written file."""

import errno
import fcntl
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpt2box.errors import BadInput, VolumeUnwritable


def open_regular(path: str | Path, flags: int) -> int:
    """Open regular files only: an opener for `open`.

    Reading a pipe or device could block or never end; writing through a link could write anywhere.

    Raises OSError: the path is a pipe, a device or, for writing, a link; or the system's own error.
    """
    if flags & (os.O_WRONLY | os.O_RDWR):
        flags |= os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)  # opening a pipe would wait for its other end
    except OSError as error:
        if error.errno != errno.ENXIO:  # a pipe without a reader, or a socket
            raise
        raise not_a_file_error(path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_a_file_error(path)
    return descriptor


def not_a_file_error(path: str | Path) -> OSError:
    """Build an OSError for a path that is not a regular file."""
    return OSError(errno.EINVAL, "not a file", str(path))


def check_regular_file(path: Path) -> None:
    """Check a file that a library will open. Raises OSError as `open_regular`."""
    os.close(open_regular(path, os.O_RDONLY))


def read_text(path: Path) -> str:
    """Read a file's UTF-8 text. Raises UnicodeDecodeError if it is another encoding, OSError as `open_regular`."""
    with open(path, encoding="utf-8", opener=open_regular) as file:
        return file.read()


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError if it is no JSON in UTF-8 or as `parse_json`, OSError as `open_regular`."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Parse JSON, but reject valid JSON that would fail later in less obvious places.

    Raises ValueError: it is not JSON, nested too deeply, or has a number of more than 300 digits.
    """
    try:
        return json.loads(text, parse_int=_parse_int)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def count_or_zero(value: object) -> int:
    """Return a count from a file; 0 if it is not a number or out of range."""
    return int(value) if isinstance(value, int | float) and abs(value) < 2**63 else 0


def _parse_int(digits: str) -> int:
    if len(digits) > 300:  # no float
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing, unreadable or not an object."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def file_lock(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process ends. `wait`: wait for another holder.

    Raises BadInput: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            time.sleep(0.1)  # is_locked may have held it for an instant
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
    """Return True if a process holds the lock file, also in another container. Never creates it."""
    try:
        descriptor = open_regular(path, os.O_RDONLY)
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


def remove_path(path: Path) -> None:
    """Remove a file or a folder tree if it exists. A link is removed, its target is not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Replace `path` with text, strings or bytes; a reader or a crash sees either the old content or the new.

    A link at `path` is replaced, not followed. Processes that write the same path wait for each other.

    Raises:
        BadInput: `path` is a pipe, a socket or a device.
        OSError: nothing was replaced, and no temporary file is left.
    """
    if is_special_file(path):
        raise BadInput(f"{path} is no file", "a file, or nothing, where one is to be written")
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb", opener=open_exclusively) as file:
        try:
            if isinstance(content, bytes):
                file.write(content)
            else:
                file.writelines(part.encode("utf-8") for part in ([content] if isinstance(content, str) else content))
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    fsync_dir(path.parent)


def is_special_file(path: Path) -> bool:
    """Return True for a pipe, a socket or a device, which must not be replaced."""
    mode = path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
    return not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode))


def open_exclusively(name: str, flags: int) -> int:
    """Open a file that no other process writes at the same time: an opener for `open`.

    A file that a killed process left is truncated.
    """
    path = Path(name)
    for _ in range(100):
        with suppress(FileNotFoundError):  # another writer may rename it between two calls
            if not stat.S_ISREG(path.lstat().st_mode):
                path.unlink()
        descriptor = os.open(path, (flags & ~os.O_TRUNC) | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                os.ftruncate(descriptor, 0)
                return descriptor
        except FileNotFoundError:
            pass  # the previous holder has renamed it
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OSError(errno.EAGAIN, "other processes write it, one after the other", name)


def write_lock_token(lock: Path) -> str:
    """Write a random token into a held lock file, by which `check_lock_token` recognizes it."""
    word = uuid.uuid4().hex
    with open(lock, "w", encoding="utf-8", opener=open_regular) as file:
        file.write(word)
    return word


def check_lock_token(lock: Path, word: str) -> None:
    """Check that this process's lock file is still at its path, before writing or deleting beside it.

    The folder may have been removed, or another disk mounted over it. Inode numbers are not compared, because some
    network file systems change them.

    Raises VolumeUnwritable: the lock file is gone or another's.
    """
    if not word:
        return  # no lock is held
    try:
        same = read_text(lock) == word
    except (OSError, ValueError):
        same = False
    if not same:
        raise VolumeUnwritable(
            f"{lock.parent} is {'not the folder any more that this began in' if lock.parent.is_dir() else 'gone'}",
            "that folder until the end",
            "put it back, or mount its disk again; the same command then goes on from its last checkpoint",
        )
