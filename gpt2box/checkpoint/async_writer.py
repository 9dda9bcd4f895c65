"""Checkpoints saved while training continues: training waits only for a copy into host memory.

A thread writes, syncs, verifies and renames the checkpoint, updates the links and deletes old checkpoints. At most one
save is in flight: the next waits for it, so that no checkpoint is dropped and the disk is not asked for more than it
can do. If the host has no memory for the copy, training waits for the whole save, and a line says so.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from gpt2box.checkpoint import retention
from gpt2box.checkpoint.metadata import TrainState
from gpt2box.checkpoint.writer import (
    TensorFiles,
    check_disk_space,
    checkpoint_bytes,
    checkpoint_config,
    checkpoint_tensors,
    publish_checkpoint,
)
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.distributed.fsdp import full_tensor, meta_tensor
from gpt2box.model.gpt2 import GPT2
from gpt2box.planner.run_plan import RunPlan
from gpt2box.system.host import memory_bytes
from gpt2box.utils.files import check_lock_token
from gpt2box.utils.progress import format_bytes

SLAB_BYTES = 1 << 29  # allocated at a time; PyTorch rounds page-locked memory up to powers of two
ALIGN_BYTES = 64
SPARE_BYTES = 256 << 20  # host memory left for other programs, besides a quarter of the copy


class StagingBuffer:
    """Host memory for the tensors of a checkpoint, reused by all saves; page-locked for tensors of a GPU.

    A thread allocates it, because memory is slow when it is first touched.
    """

    def __init__(self, files: TensorFiles, pin: bool) -> None:
        self._pin = pin
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._error: Exception | None = None
        needed = [((file, name), like) for file, tensors in files.items() for name, like in tensors(meta_tensor)]
        self._allocator = Thread(target=self._allocate, args=(needed,), name="staging-buffer", daemon=True)
        self._allocator.start()

    def copy(self, files: TensorFiles) -> TensorFiles:
        """Copy the tensors with their strides; the copy is valid until the next one.

        Raises MemoryError: the buffer could not be allocated.
        """
        self._allocator.join()
        if self._error:
            raise MemoryError from self._error
        copied: TensorFiles = {}
        devices = set()
        for file, tensors in files.items():
            copies = []
            for name, tensor in tensors(full_tensor):
                copies.append((name, self._buffers[file, name].copy_(tensor, non_blocking=True)))
                devices.add(tensor.device)
            copied[file] = lambda _, copies=copies: copies  # type: ignore[misc]
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return copied

    def _allocate(self, needed: list[tuple[tuple[str, str], Tensor]]) -> None:
        remaining = sum(aligned_bytes(tensor) for _, tensor in needed)
        slab, used = torch.empty(0, dtype=torch.uint8), 0
        try:
            for key, like in needed:
                if used + aligned_bytes(like) > slab.numel():
                    slab, used = self._allocate_slab(max(aligned_bytes(like), min(SLAB_BYTES, remaining))), 0
                buffer = slab[used : used + like.numel() * like.element_size()].view(like.dtype)
                self._buffers[key] = buffer.as_strided(like.shape, like.stride())
                used, remaining = used + aligned_bytes(like), remaining - aligned_bytes(like)
        except (RuntimeError, MemoryError) as error:  # PyTorch's allocators raise the former
            self._buffers.clear()
            self._error = error

    def _allocate_slab(self, size_bytes: int) -> Tensor:
        if self._pin:
            try:
                return torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # WSL2 limits page-locked memory to 0.5 to 1 GiB; pageable memory copies more slowly
                self._pin = False
        return torch.zeros(size_bytes, dtype=torch.uint8)


def aligned_bytes(tensor: Tensor) -> int:
    """Return the size of a tensor, rounded up to ALIGN_BYTES."""
    return math.ceil(tensor.numel() * tensor.element_size() / ALIGN_BYTES) * ALIGN_BYTES


class ShardContributor:
    """Replaces AsyncCheckpointWriter on the other ranks of a sharded run: joins the gathering of each tensor."""

    def __init__(self, model: GPT2, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def save(self, state: TrainState) -> None:
        """Gather all tensors, in the order in which rank 0 does."""
        for tensors in checkpoint_tensors(self.model, self.optimizer, state).values():
            for _ in tensors(full_tensor):
                pass

    def raise_if_failed(self) -> None:
        """Do nothing; rank 0 writes, so only rank 0 can fail."""

    wait = close = raise_if_failed


class AsyncCheckpointWriter:
    """Saves the checkpoints of a run. An error on its thread is raised by the next call of a method."""

    def __init__(
        self,
        folder: Path,
        model: GPT2,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        plan: RunPlan,
        log: Callable[[str], None],
        lock_mark: str = "",
        staging_buffer: StagingBuffer | None = None,
    ) -> None:
        """Allocate the staging buffer, unless given that of an earlier writer. `lock_mark`: see publish_checkpoint."""
        self.folder, self.model, self.optimizer, self.tokenizer, self.plan = folder, model, optimizer, tokenizer, plan
        self._log, self._lock_mark = log, lock_mark
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self.staging_buffer = staging_buffer
        if staging_buffer:
            return
        after_first_step = TrainState(optimizer_steps=1)
        needed = checkpoint_bytes(model, optimizer, after_first_step)
        if memory_bytes()[1] < needed + needed // 4 + SPARE_BYTES:
            self._drop_staging_buffer(needed)
        else:
            files = checkpoint_tensors(model, optimizer, after_first_step)
            self.staging_buffer = StagingBuffer(files, pin=torch.device(plan.derived.device).type == "cuda")

    def save(self, state: TrainState) -> None:
        """Wait for the save in flight, copy the tensors, and start to save them and to delete old checkpoints.

        Raises VolumeUnwritable: too little disk space for this save, or the save before failed.
        """
        self.wait()
        check_lock_token(self.folder.parent / ".lock", self._lock_mark)
        needed = checkpoint_bytes(self.model, self.optimizer, state)
        check_disk_space(self.folder, needed, state.step)
        files = checkpoint_tensors(self.model, self.optimizer, state)
        config = checkpoint_config(self.model, self.tokenizer)
        state = replace(state, rollbacks=list(state.rollbacks))
        if self.staging_buffer:
            try:
                files = self.staging_buffer.copy(files)
            except MemoryError:
                self._drop_staging_buffer(needed)
        if not self.staging_buffer:
            return self._write(files, config, state)
        self._thread = Thread(target=self._write_in_thread, args=(files, config, state), name="saver", daemon=True)
        self._thread.start()

    def raise_if_failed(self) -> None:
        """Raise the error of the last save, such as VolumeUnwritable, if it has failed by now. Does not wait."""
        if error := self._error:
            self._error = None
            raise error

    def wait(self) -> None:
        """Wait until the last save is on disk; raises its error, such as VolumeUnwritable."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.raise_if_failed()

    def close(self) -> None:
        """Wait for the last save and only log its error, so that it does not hide an error already on its way."""
        try:
            self.wait()
        except Exception as error:
            self._log(str(error) or type(error).__name__)

    def _write_in_thread(self, files: TensorFiles, config: dict[str, object], state: TrainState) -> None:
        try:
            self._write(files, config, state)
        except BaseException as error:  # raised by the next call of a method
            self._error = error

    def _write(self, files: TensorFiles, config: dict[str, object], state: TrainState) -> None:
        publish_checkpoint(self.folder, files, config, state, self.tokenizer, self._lock_mark)
        check_lock_token(self.folder.parent / ".lock", self._lock_mark)
        retention.delete_old_checkpoints(
            self.folder, self.plan.config.keep_last, state, self.plan.derived.save_interval
        )

    def _drop_staging_buffer(self, needed: int) -> None:
        self.staging_buffer = None
        free = memory_bytes()[1]
        self._log(
            f"checkpoints are written while training waits: a copy takes {format_bytes(needed)}, "
            f"{format_bytes(free)} are free"
        )
