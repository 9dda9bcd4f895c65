"""Load batches as a pure function of (seed, step), so that resuming needs one integer.

The token file is cut into windows of block_size; each epoch visits every window once, in an order
that a keyed permutation gives without storing it, and starts cutting at another offset, so that
window borders move. A step takes the next `sequences_per_step` windows. Their distribution
over micro-steps and ranks does not change which they are.

    B  sequences in a micro-batch     T  block_size
"""

import hashlib
import queue
import threading
from collections.abc import Generator
from contextlib import closing
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gpt2box.data.dataset import TokenFile
from gpt2box.errors import BadInput

PREFETCH = 4  # micro-batches kept ready


class TrainWindows:
    """Define the order of a training split's windows."""

    def __init__(self, tokens: int, block_size: int, seed: int) -> None:
        check_split_lengths({"train": tokens}, block_size)
        self.block_size = block_size
        self.seed = seed
        # One window less than fit, so that every offset below block_size leaves room for all.
        self.count = max(1, (tokens - block_size) // block_size)
        self.offsets = min(block_size, tokens - self.count * block_size)

    def start(self, sequence: int) -> int:
        """Return the first token of the run's `sequence`-th window, counted from the start of training."""
        epoch, position = divmod(sequence, self.count)
        key = hashlib.sha256(f"{self.seed}:{epoch}".encode()).digest()
        offset = int.from_bytes(key[:8], "little") % self.offsets
        return offset + permute_index(position, self.count, key) * self.block_size


def permute_index(index: int, count: int, key: bytes) -> int:
    """Return the image of `index` under a keyed permutation of range(count).

    Four Feistel rounds on the next even power of two, walked until the value is in range (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"). Own code, since no library promises the
    same order from version to version, and a stored order of OpenWebText would be 35 MB.
    """
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for turn in range(4):
            word = hashlib.blake2b(right.to_bytes(8, "little"), key=key, salt=bytes([turn]), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(word, "little") & mask)
        index = (left << half_bits) | right
        if index < count:
            return index


def val_window_starts(tokens: int, block_size: int, wanted: int) -> npt.NDArray[np.int64]:
    """Return the first tokens of the fixed validation windows: evenly spread, never overlapping; all for wanted=0.

    Raises BadInput: not one window fits.
    """
    check_split_lengths({"val": tokens}, block_size)
    count = (tokens - 1) // block_size
    chosen = min(wanted or count, count)
    return (np.arange(chosen) * count // chosen) * block_size


def check_split_lengths(tokens: dict[str, int], block_size: int) -> None:
    """Check that a window and its target fit into each split.

    Raises BadInput: with the largest block_size that does.
    """
    split, shortest = min(tokens.items(), key=lambda item: item[1])
    if shortest <= block_size:
        raise BadInput(
            f"the {split} split has {shortest:,} tokens, too few for block_size {block_size:,} and a target",
            f"block_size at most {max(shortest - 1, 1):,}",
            f"--block-size {max(shortest - 1, 1)}, or prepare more text",
        )


def read_windows(file: TokenFile, starts: list[int], block_size: int, vocab_size: int) -> torch.Tensor:
    """Read windows with their targets, int32 of shape (B, T + 1), for `inputs_and_targets`.

    An id that is not a target is stored as -1 - id.

    Raises BadInput: an id that the vocabulary does not have; it would be an illegal read on a GPU.
    """
    windows = np.stack([file.read(start, block_size + 1) for start in starts])  # (B, T + 1)
    if (largest := int(windows.max())) >= vocab_size:
        raise BadInput(f"the dataset holds token id {largest:,}", f"ids below {vocab_size:,}, the vocabulary's size")
    windows = windows.astype(np.int32)
    counted = [file.counted(start, block_size + 1) for start in starts]
    if counted[0] is not None:
        windows = np.where(np.stack(counted), windows, ~windows)  # type: ignore[arg-type]
    return torch.from_numpy(windows)


def pin_if_possible(batch: torch.Tensor) -> torch.Tensor:
    """Pin the batch in page-locked memory, or return it unpinned if none is left: WSL2 has half a GiB, or one.

    Not verified on a GPU. CUDA reports that lack as "CUDA error: out of memory", although GPU memory is not involved.
    """
    try:
        return batch.pin_memory()
    except RuntimeError:
        return batch


def copy_to_device(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy the batch to the device. From page-locked memory the copy is asynchronous, on a stream of its own.

    Not verified on a GPU.
    """
    if device.type != "cuda":
        return batch.to(device)
    beside, working = copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        there = batch.to(device, non_blocking=True)
    working.wait_stream(beside)  # the device waits, not the host
    there.record_stream(working)  # keep the memory until the work queued now is done
    return there


@lru_cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's stream for copies."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def inputs_and_targets(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split windows (B, T + 1) into inputs and targets (B, T); ignored targets are -1."""
    inputs = batch[:, :-1]
    return inputs ^ (inputs >> 31), batch[:, 1:].clamp(min=-1)


def count_loss_targets(batch: torch.Tensor) -> int:
    """Count the targets of windows in CPU memory that are not ignored."""
    return int((batch[:, 1:] >= 0).sum())


def micro_batches(
    path: Path,
    windows: TrainWindows,
    vocab_size: int,
    first_sequence: int,
    micro_batch_size: int,
    pin: bool,
    ranks: int,
) -> Generator[torch.Tensor, None, None]:
    """Yield micro-batches without end from the run's `first_sequence`-th window, prefetched on a thread.

    `pin`: use page-locked memory, for asynchronous copies to the GPU. `ranks`: how many ranks take micro-batches
    in turn.
    """
    ready: queue.Queue[torch.Tensor | BaseException] = queue.Queue(PREFETCH)
    stop = threading.Event()

    def put(item: torch.Tensor | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read_ahead() -> None:
        sequence = first_sequence
        try:
            with closing(TokenFile(path)) as file:
                while not stop.is_set():
                    starts = [windows.start(sequence + i) for i in range(micro_batch_size)]
                    batch = read_windows(file, starts, windows.block_size, vocab_size)
                    put(pin_if_possible(batch) if pin else batch)
                    sequence += micro_batch_size * ranks
        except BaseException as error:  # handed over, not lost with the thread
            put(error)

    thread = threading.Thread(target=read_ahead, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
