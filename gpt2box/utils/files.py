"""Files as others may have left them: none that ends in a wait, and none that is ever seen half-written."""

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
    """An opener for `open`: a pipe or a device in a file's place would be waited for, or read without end, and to write
    where a link leads would be to write anywhere.

    Raises OSError: it is one, or as the system says.
    """
    if flags & (os.O_WRONLY | os.O_RDWR):
        flags |= os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)  # to open a pipe would be to wait for its other end
    except OSError as error:
        if error.errno != errno.ENXIO:  # a pipe that nobody reads, or a socket
            raise
        raise not_a_file_error(path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_a_file_error(path)
    return descriptor


def not_a_file_error(path: str | Path) -> OSError:
    """What the system might say of it."""
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
    """As json.loads, but that nothing in it is of no use to anyone, and some things would end in other errors later.

    Raises ValueError: it is no JSON, nested too deeply, or has a number of more than 300 digits.
    """
    try:
        return json.loads(text, parse_int=_parse_int)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def count_or_zero(value: object) -> int:
    """A count from a file; 0 for what is no number, or none that a run could have."""
    return int(value) if isinstance(value, int | float) and abs(value) < 2**63 else 0


def _parse_int(digits: str) -> int:
    if len(digits) > 300:  # no float
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; nothing where it is missing, unreadable or no object."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def file_lock(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock file; the system frees it with the process, however that ends. `wait`: until another has done.

    Raises BadInput: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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
    """A folder with what is in it, or a file, where it is there; of a link itself alone: it may lead to what someone
    moved to another disk.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Replace `path` with a text, its parts, or bytes; a reader or a crash sees the old content or the new, never half.

    A link that lies there is replaced, not followed. Processes that write one path do so one after the other.

    Raises:
        BadInput: a pipe, a socket or a device lies there.
        OSError: nothing was replaced, and nothing is left.
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
    """Whether what lies there is a pipe, a socket or a device, which is not to be replaced."""
    mode = path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
    return not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode))


def open_exclusively(name: str, flags: int) -> int:
    """For open(): a file that no other process writes meanwhile; what a killed one left there is begun anew."""
    path = Path(name)
    for _ in range(100):
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            path.unlink(missing_ok=True)
        descriptor = os.open(path, (flags & ~os.O_TRUNC) | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                os.ftruncate(descriptor, 0)
                return descriptor
        except FileNotFoundError:
            pass  # the one before has given it its name
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OSError(errno.EAGAIN, "other processes write it, one after the other", name)


def write_lock_token(lock: Path) -> str:
    """Write a random token into a held lock file, for check_lock_token."""
    word = uuid.uuid4().hex
    with open(lock, "w", encoding="utf-8", opener=open_regular) as file:
        file.write(word)
    return word


def check_lock_token(lock: Path, word: str) -> None:
    """Before something is written or removed beside a lock file that this process holds: whether it still lies there.

    The folder may have been removed, or another disk mounted over it, and have another owner by now. Not by the file's
    number: some network file systems change it.

    Raises VolumeUnwritable: another lies there, or none.
    """
    if not word:
        return  # nothing is held
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
