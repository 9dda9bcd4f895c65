"""Reading and writing of safetensors files one tensor at a time, so that only one tensor is in memory twice.

The safetensors package's save_file expects all tensors laid out as on disk. The staging buffer (async_writer.py) holds
them as training does, and converting all at once would need a checkpoint's memory again. Reading into one buffer is
several times faster than the package's memory mapping, which takes a page fault for each page.

    8 bytes   length of the header, little-endian
    header    JSON, padded with spaces to a multiple of 8: dtype, shape and offsets of each tensor
    data      row-major, without gaps
"""

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

from gpt2box.distributed.fsdp import full_tensor, meta_tensor
from gpt2box.errors import Damaged, describe_error
from gpt2box.utils.files import open_regular, parse_json

# Yields the (name, tensor) pairs of a file, the largest dtypes first, in the same order each time. It applies the given
# function to each tensor: `full_tensor` to gather it, or `meta_tensor` for its shape.
TensorSource = Callable[[Callable[[Tensor], Tensor]], Iterable[tuple[str, Tensor]]]

MAX_HEADER_BYTES = 100_000_000  # the safetensors package's limit
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}


def write_tensors(path: Path, tensors: TensorSource) -> str:
    """Write and sync a file; returns the sha256 of the data in memory, to compare with what the disk returns.

    Raises OSError: as the system reports it.
    """
    header = encode_header(tensors(meta_tensor))
    sha256 = hashlib.sha256(header)
    with open(path, "wb", buffering=0) as file:
        write_all(file.fileno(), memoryview(header))
        for _, tensor in tensors(full_tensor):
            data = memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)  # (bytes,)
            sha256.update(data)
            write_all(file.fileno(), data)
        os.fsync(file.fileno())
    return sha256.hexdigest()


def encode_header(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """Encode the header and its length."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data`, retrying short writes."""
    while data:
        data = data[os.write(descriptor, data) :]


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor in the order of the file; each tensor is valid until the next.

    Raises:
        Damaged: the header is invalid, or the data does not match it.
        OSError: as the system reports it.
    """
    with open(path, "rb", buffering=0, opener=open_regular) as file:
        entries = read_header(file, path)
        buffer = torch.empty(max((entry.bytes for entry in entries), default=0), dtype=torch.uint8)
        for entry in entries:
            data = buffer[: entry.bytes]
            unread = memoryview(data.numpy().data)
            while unread:
                if not (count := file.readinto(unread)):
                    raise OSError(errno.EIO, "the file ends too early", str(path))
                unread = unread[count:]
            yield entry.name, data.view(entry.dtype).reshape(entry.shape)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header describes it."""

    name: str
    dtype: torch.dtype
    shape: list[int]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: FileIO, path: Path) -> list[TensorEntry]:
    """Read the header and return its entries in the order of the data; leaves the file at the first tensor.

    Raises Damaged: the header is not what the package would write: tensors without gaps, from the header to the end.
    """
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    size = os.fstat(file.fileno()).st_size
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"a header of {length:,} bytes")
        content = parse_json(file.read(length).decode("utf-8"))
        content.pop("__metadata__", None)
        entries = []
        end = 0
        for name, values in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
            entry, offsets = TensorEntry(name, dtypes[values["dtype"]], values["shape"]), values["data_offsets"]
            is_shape = all(type(number) is int and number >= 0 for number in entry.shape)
            if not is_shape or offsets != [end, end + entry.bytes]:
                raise ValueError(f"{name!r} of shape {entry.shape} lies at {offsets}")
            end += entry.bytes
            entries.append(entry)
        if 8 + length + end != size:
            raise ValueError(f"{8 + length + end:,} bytes are described of {size:,}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Damaged(
            f"{path} does not hold what its header says ({describe_error(error)})", "an intact safetensors file"
        ) from error
    return entries
