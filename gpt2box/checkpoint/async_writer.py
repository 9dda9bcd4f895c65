"""Checkpoints while training goes on: it waits for a copy into host memory, a thread does the rest.

The thread writes, syncs, reads back, renames, sets the links and removes what is no longer kept. One save is in flight
at most: the next waits for it, so that no checkpoint is left out and the disk is asked for no more than it can do.
Where the host has no memory for the copy, training waits for the whole save, and it is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from gpt2box.checkpoint import retention
from gpt2box.checkpoint import writer as checkpoint
from gpt2box.checkpoint.metadata import TrainState
from gpt2box.checkpoint.safetensors_io import Tensors
from gpt2box.checkpoint.writer import Files
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.distributed.fsdp import outline, whole
from gpt2box.model.gpt2 import GPT2
from gpt2box.planner.run_plan import RunPlan
from gpt2box.system.host import memory_bytes
from gpt2box.utils.files import check_mark
from gpt2box.utils.progress import size

SLAB = 1 << 29  # bytes that are asked of the system at a time; page-locked memory comes in powers of two
ALIGN = 64
SPARE_BYTES = 256 << 20  # of the host's memory, and a quarter of the copy: what else may want some meanwhile


class Snapshot:
    """Room in host memory for a checkpoint's tensors, kept from one to the next; page-locked for a GPU's.

    It is made on a thread of its own: memory is slow when it is touched for the first time.
    """

    def __init__(self, files: Files, pin: bool) -> None:
        self._pin = pin
        self._room: dict[tuple[str, str], Tensor] = {}
        self._fault: Exception | None = None
        wanted = [((file, name), like) for file, tensors in files.items() for name, like in tensors(outline)]
        self._maker = Thread(target=self._make_room, args=(wanted,), name="snapshot", daemon=True)
        self._maker.start()

    def take(self, files: Files) -> Files:
        """A copy of the tensors, with the strides that they have; valid until the next is taken.

        Raises:
            MemoryError: there was no room.
        """
        self._maker.join()
        if self._fault:
            raise MemoryError from self._fault
        taken: Files = {}
        devices = set()
        for file, tensors in files.items():
            copies = []
            for name, tensor in tensors(whole):
                copies.append((name, self._room[file, name].copy_(tensor, non_blocking=True)))
                devices.add(tensor.device)
            taken[file] = as_tensors(copies)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return taken

    def _make_room(self, wanted: list[tuple[tuple[str, str], Tensor]]) -> None:
        left = sum(rounded(tensor) for _, tensor in wanted)
        slab, used = torch.empty(0, dtype=torch.uint8), 0
        try:
            for key, like in wanted:
                if used + rounded(like) > slab.numel():
                    room = max(rounded(like), min(SLAB, left))
                    slab, used = self._slab(room), 0
                piece = slab[used : used + like.numel() * like.element_size()].view(like.dtype)
                self._room[key] = piece.as_strided(like.shape, like.stride())
                used, left = used + rounded(like), left - rounded(like)
        except (RuntimeError, MemoryError) as error:  # PyTorch's allocators raise the former
            self._room.clear()
            self._fault = error

    def _slab(self, room: int) -> Tensor:
        if self._pin:
            try:
                return torch.zeros(room, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # WSL2 has half a GiB of such memory, or one; the copy takes longer without
                self._pin = False
        return torch.zeros(room, dtype=torch.uint8)


def rounded(tensor: Tensor) -> int:
    """Bytes, so that the next begins on a good address."""
    return math.ceil(tensor.numel() * tensor.element_size() / ALIGN) * ALIGN


def as_tensors(copies: Iterable[tuple[str, Tensor]]) -> Tensors:
    """The same each time."""
    return lambda _: copies


class Companion:
    """Stands for the saver of the first rank on the others, whose rows it puts together with its own."""

    def __init__(self, model: GPT2, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def save(self, state: TrainState) -> None:
        """In the same order."""
        for tensors in checkpoint.contents(self.model, self.optimizer, state).values():
            for _ in tensors(whole):
                pass

    def check(self) -> None:
        """The first rank does."""

    finish = close = check


class Saver:
    """Saves a run's checkpoints. What goes wrong on its thread is raised at the next call of `check` or `save`."""

    def __init__(
        self,
        folder: Path,
        model: GPT2,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        plan: RunPlan,
        say: Callable[[str], None],
        mark: str = "",
        snapshot: Snapshot | None = None,
    ) -> None:
        """`mark`: of the run's lock, where it has one; `snapshot`: that of a saver before, of the same tensors."""
        self.folder, self.model, self.optimizer, self.tokenizer, self.plan = folder, model, optimizer, tokenizer, plan
        self._say, self._mark = say, mark
        self._writer: Thread | None = None
        self._fault: BaseException | None = None
        self.snapshot = snapshot
        if snapshot:
            return
        needed = checkpoint.checkpoint_bytes(model, optimizer, TrainState(optimizer_steps=1))
        if memory_bytes()[1] < needed + needed // 4 + SPARE_BYTES:
            self._without_snapshot(needed)
        else:
            files = checkpoint.contents(model, optimizer, TrainState(optimizer_steps=1))
            self.snapshot = Snapshot(files, pin=torch.device(plan.device).type == "cuda")

    def save(self, state: TrainState) -> None:
        """Save a checkpoint of what is there now, and remove those that are not kept; waits for the one before.

        Raises:
            VolumeUnwritable: no space for this one; or what befell the one before.
        """
        self.finish()
        check_mark(self.folder.parent / ".lock", self._mark)
        needed = checkpoint.checkpoint_bytes(self.model, self.optimizer, state)
        checkpoint.check_space(self.folder, needed, state.step)
        files = checkpoint.contents(self.model, self.optimizer, state)
        config = checkpoint.config_of(self.model, self.tokenizer)
        state = replace(state, rollbacks=list(state.rollbacks))
        if self.snapshot:
            try:
                files = self.snapshot.take(files)
            except MemoryError:
                self._without_snapshot(needed)
        if not self.snapshot:
            return self._publish(files, config, state)
        self._writer = Thread(target=self._write, args=(files, config, state), name="saver", daemon=True)
        self._writer.start()

    def check(self) -> None:
        """Whether all went well so far, without waiting.

        Raises:
            VolumeUnwritable: it did not.
        """
        if fault := self._fault:
            self._fault = None
            raise fault

    def finish(self) -> None:
        """Wait until all is on the disk.

        Raises:
            VolumeUnwritable: it is not.
        """
        if self._writer:
            self._writer.join()
            self._writer = None
        self.check()

    def close(self) -> None:
        """The same where another failure is on its way already: this one is only said."""
        try:
            self.finish()
        except Exception as fault:
            self._say(str(fault) or type(fault).__name__)

    def _write(self, files: Files, config: dict[str, object], state: TrainState) -> None:
        try:
            self._publish(files, config, state)
        except BaseException as fault:  # handed over, not lost with the thread
            self._fault = fault

    def _publish(self, files: Files, config: dict[str, object], state: TrainState) -> None:
        checkpoint.publish(self.folder, files, config, state, self.tokenizer, self._mark)
        check_mark(self.folder.parent / ".lock", self._mark)
        retention.prune(self.folder, self.plan.keep_last, state, self.plan.save_interval)

    def _without_snapshot(self, needed: int) -> None:
        self.snapshot = None
        free = memory_bytes()[1]
        self._say(f"checkpoints are written while training waits: a copy takes {size(needed)}, {size(free)} are free")
