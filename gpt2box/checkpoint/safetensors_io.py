"""Writing a safetensors file tensor by tensor, so that only one of them is there twice.

The package's own save_file wants all tensors laid out as on disk; the snapshot they are written from (saver.py) has
them as training does, and putting all in order at once would take a checkpoint's memory once more. And reading into one
buffer is several times faster than the package's mapping of the file, each page of which is a fault.

    8 bytes     length of the header, little-endian
    the header  JSON, padded with spaces to a multiple of 8: each tensor's dtype, shape and place behind the header
    the data    row-major, without gaps
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from gpt2box.distributed.fsdp import outline, whole
from gpt2box.errors import Damaged, why
from gpt2box.utils.files import parse_json, regular

# A file's tensors by name, the same each time, those of more bytes a number first; each is what is given to this end
# makes of it where it lies: `whole` or `outline` (shards.py).
Tensors = Callable[[Callable[[Tensor], Tensor]], Iterable[tuple[str, Tensor]]]

LONGEST_HEADER = 100_000_000  # bytes, as the package has it
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}


def write_tensors(path: Path, tensors: Tensors) -> str:
    """Write and sync them; returns the sha256 of what was to be written, which a bad disk may have made another thing.

    Raises:
        OSError: as the system says.
    """
    header = header_of(tensors(outline))
    digest = hashlib.sha256(header)
    with open(path, "wb", buffering=0) as file:
        write_all(file.fileno(), memoryview(header))
        for _, tensor in tensors(whole):
            data = memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)  # (bytes,)
            digest.update(data)
            write_all(file.fileno(), data)
        os.fsync(file.fileno())
    return digest.hexdigest()


def header_of(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """All that stands before the data."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_all(descriptor: int, data: memoryview) -> None:
    """The system may take less than it is given."""
    while data:
        data = data[os.write(descriptor, data) :]


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file, in its order; each is valid until the next.

    Raises:
        Damaged: its header is none, or does not fit what follows it.
        OSError: as the system says.
    """
    with open(path, "rb", buffering=0, opener=regular) as file:
        entries = read_header(file, path)
        room = torch.empty(max((entry.bytes for entry in entries), default=0), dtype=torch.uint8)
        for entry in entries:
            piece = room[: entry.bytes]
            left = memoryview(piece.numpy().data)
            while left:
                if not (count := file.readinto(left)):
                    raise OSError(errno.EIO, "the file ends too early", str(path))
                left = left[count:]
            yield entry.name, piece.view(entry.dtype).reshape(entry.shape)


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: list[int]

    @property
    def bytes(self) -> int:
        """On disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: FileIO, path: Path) -> list[Entry]:
    """What a file holds, in its order; it is read up to the first tensor.

    Raises:
        Damaged: that is not what the package would write: one tensor behind the other, from the header to the end.
    """
    kinds = {name: dtype for dtype, name in DTYPES.items()}
    size = os.fstat(file.fileno()).st_size
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"a header of {length:,} bytes")
        content = parse_json(file.read(length).decode("utf-8"))
        content.pop("__metadata__", None)
        found = []
        end = 0
        for name, about in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
            entry = Entry(name, kinds[about["dtype"]], about["shape"])
            if not all(type(number) is int and number >= 0 for number in entry.shape) or about["data_offsets"] != [
                end,
                end + entry.bytes,
            ]:
                raise ValueError(f"{name!r} of shape {entry.shape} lies at {about['data_offsets']}")
            end += entry.bytes
            found.append(entry)
        if 8 + length + end != size:
            raise ValueError(f"{8 + length + end:,} bytes are described of {size:,}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Damaged(
            f"{path} does not hold what its header says ({why(error)})", "a whole safetensors file"
        ) from error
    return found
