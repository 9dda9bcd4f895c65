"""Peak memory of a training step on a GPU, found without one: the real model and optimizer on tensors without data.

FakeTensorMode runs the program without memory; a dispatch mode beside it notes when each storage is born and dies.
Three things make it speak for CUDA: the program takes CUDA's paths (`cuda_rules`), scratch space that no dispatcher
sees is added by rule (`SCRATCH`), and the log is replayed through a model of PyTorch's caching allocator.

Fake tensors of the device `cuda` need a driver, so these are on `cpu`.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2box.distributed.fsdp import local_shard
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.lora import add_adapters
from gpt2box.optim import quantization
from gpt2box.optim.clipped_step import make_optimizer_step
from gpt2box.optim.factory import make_optimizer
from gpt2box.planner.run_plan import RunPlan
from gpt2box.training.evaluate import autocast
from gpt2box.training.model_setup import configure, make_empty_model

MIB = 1 << 20
CUBLAS_WORKSPACE = 8_519_680  # :4096:2:16:8, cuBLAS's default below compute capability 9.0


def up(count: int, to: int = 512) -> int:
    return -(-count // to) * to


def flash_backward(arguments: tuple[Any, ...]) -> int:
    """dq is summed in float32, and a softmax term is kept for each row."""
    batch, heads, tokens, width = arguments[1].shape
    rows = batch * heads * up(tokens, 128)
    return rows * up(width, 32) * 4 + rows * 4


def embedding_backward(arguments: tuple[Any, ...]) -> int:
    """It sorts the indices: six arrays of int64."""
    return int(arguments[1].numel()) * 8 * 6


SCRATCH: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "aten._scaled_dot_product_flash_attention_backward.default": flash_backward,
    "aten.embedding_dense_backward.default": embedding_backward,
}


@dataclass
class Simulated:
    """What the step needs, in bytes."""

    allocated: int = 0
    reserved: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    phases: dict[str, int] = field(default_factory=dict)  # the peak in each


class Recorder(TorchDispatchMode):
    """A log of (storage, bytes, phase): positive when it is born, negative when it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, int, str]] = []
        self.kind: dict[int, str] = {}
        self.phase = "model"
        self._numbers: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._next = 0

    def see(self, tensor: object, kind: str) -> None:
        """Note a tensor's storage, if it is new."""
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        storage = local_shard(tensor).untyped_storage()
        key = storage._cdata
        if key in self._numbers or storage.nbytes() == 0:
            return
        number = self._born(up(storage.nbytes()), kind)
        self._numbers[key] = number
        self._references[number] = weakref.ref(storage, lambda _: self._died(key, number))

    def name(self, tensor: Tensor, kind: str) -> None:
        """What a storage is, known afterwards."""
        self.kind[self._numbers[local_shard(tensor).untyped_storage()._cdata]] = kind

    def resized(self, tensor: Tensor, change: int) -> None:
        """A storage that is emptied, or filled again."""
        key = tensor.untyped_storage()._cdata
        if change and key not in self._numbers:
            self.see(tensor, "gathered")
        elif change:
            number = self._numbers[key]
            self.log.append((number, self._size[number] if change > 0 else -self._size[number], self.phase))

    def _born(self, count: int, kind: str) -> int:
        number, self._next = self._next, self._next + 1
        self.kind[number] = kind
        self.log.append((number, count, self.phase))
        self._size = getattr(self, "_size", {})
        self._size[number] = count
        return number

    def _died(self, key: int, number: int) -> None:
        if self._numbers.get(key) == number:
            del self._numbers[key]
        self._references.pop(number, None)
        self.log.append((number, -self._size[number], self.phase))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self.see(leaf, "activations")
        if rule := SCRATCH.get(str(func)):
            number = self._born(up(rule(args)), "scratch")
            self.log.append((number, -self._size[number], self.phase))
        return result

    def peak(self) -> Simulated:
        """The moment at which most lives."""
        live, most, when = 0, 0, 0
        phases: dict[str, int] = {}
        for index, (_, change, phase) in enumerate(self.log):
            live += change
            phases[phase] = max(phases.get(phase, 0), live + CUBLAS_WORKSPACE)
            if live > most:
                most, when = live, index
        alive: dict[int, int] = {}
        for number, change, _ in self.log[: when + 1]:
            if change > 0:
                alive[number] = change
            else:
                alive.pop(number)
        by_kind: dict[str, int] = {}
        for number, count in alive.items():
            by_kind[self.kind[number]] = by_kind.get(self.kind[number], 0) + count
        return Simulated(
            most + CUBLAS_WORKSPACE, self.reserved() + up(CUBLAS_WORKSPACE, 2 * MIB), by_kind, self.log[when][2], phases
        )

    def reserved(self) -> int:
        """Most memory that the caching allocator, with expandable segments, would have taken from the card."""
        pools = {True: Pool(2 * MIB), False: Pool(20 * MIB)}
        place: dict[int, tuple[bool, int]] = {}
        size: dict[int, int] = {}
        for number, change, _ in self.log:
            if change > 0:
                small = change <= MIB
                place[number], size[number] = (small, pools[small].take(change)), change
            else:
                small, address = place.pop(number)
                pools[small].give(address, size[number])
        return sum(pool.end for pool in pools.values())


class Pool:
    """One expandable segment: best fit among the gaps, else it grows by whole pages. It never shrinks."""

    def __init__(self, page: int) -> None:
        self.page, self.end = page, 0
        self.gaps: list[tuple[int, int]] = []  # (bytes, address), sorted
        self.starts: dict[int, int] = {}  # address of a gap: its bytes
        self.ends: dict[int, int] = {}  # end of a gap: its address

    def _add(self, address: int, count: int) -> None:
        bisect.insort(self.gaps, (count, address))
        self.starts[address], self.ends[address + count] = count, address

    def _remove(self, address: int) -> int:
        count = self.starts.pop(address)
        del self.ends[address + count]
        del self.gaps[bisect.bisect_left(self.gaps, (count, address))]
        return count

    def take(self, count: int) -> int:
        index = bisect.bisect_left(self.gaps, (count, -1))
        if index == len(self.gaps):  # grow, from the gap at the end if there is one
            address = self.ends.get(self.end, self.end)
            have = self._remove(address) if address != self.end else 0
            grown = up(count - have, self.page)
            self.end += grown
            self._add(address, have + grown)
        else:
            address = self.gaps[index][1]
        free = self._remove(address)
        if free > count:
            self._add(address + count, free - count)
        return address

    def give(self, address: int, count: int) -> None:
        if address + count in self.starts:
            count += self._remove(address + count)
        if address in self.ends:
            before = self.ends[address]
            count += self._remove(before)
            address = before
        self._add(address, count)


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False)[0]
    return out


@contextmanager
def cuda_rules() -> Iterator[None]:
    """What CUDA does otherwise: flash attention, norms in float32 under autocast, masks of a byte, values not read."""
    kept = F.layer_norm, F.scaled_dot_product_attention, F.dropout, torch.compiler.is_compiling
    norm = F.layer_norm

    def layer_norm(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return norm(x.float() if torch.is_autocast_enabled("cpu") else x, *arguments, **options)

    def dropout_(x: Tensor, p: float, training: bool) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if p and training else x  # keeps a mask of one byte

    quantization.code_values.cache_clear()  # a tensor of another mode
    F.layer_norm, F.scaled_dot_product_attention, F.dropout = layer_norm, _flash, dropout_  # type: ignore[assignment]
    torch.compiler.is_compiling = lambda: True  # loss.py then takes the path that it takes on CUDA
    try:
        yield
    finally:
        quantization.code_values.cache_clear()
        F.layer_norm, F.scaled_dot_product_attention, F.dropout, torch.compiler.is_compiling = kept


@contextmanager
def split_over(ranks: int, recorder: Recorder) -> Iterator[None]:
    """As the first of so many ranks, whose words to the others go nowhere; what FSDP2 frees and takes is noted."""
    from torch.distributed import device_mesh, init_process_group
    from torch.distributed.fsdp._fully_shard import _fsdp_param
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # Once in a process: what PyTorch has cached of one group it looks for in the next.
    init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = device_mesh.init_device_mesh("cpu", (ranks,))  # now: it has numbers, which fake tensors have not
    kept = _fsdp_param.alloc_storage, _fsdp_param.free_storage, device_mesh.init_device_mesh

    def noting(resize: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def resized(tensor: Tensor) -> None:
            before = tensor.untyped_storage().size()
            resize(tensor)
            recorder.resized(tensor, tensor.untyped_storage().size() - before)

        return resized

    _fsdp_param.alloc_storage = noting(kept[0])  # type: ignore[assignment]
    _fsdp_param.free_storage = noting(kept[1])  # type: ignore[assignment]
    device_mesh.init_device_mesh = lambda *_, **__: mesh  # type: ignore[assignment]
    try:
        yield
    finally:
        _fsdp_param.alloc_storage, _fsdp_param.free_storage, device_mesh.init_device_mesh = kept


def simulate(plan: RunPlan, real: bool = False) -> Simulated:
    """Two steps of training, the second with the optimizer's state in place.

    `real`: with data, as the CPU does it, to hold the fake tensors against.
    """
    recorder = Recorder()
    ranks = split_over(plan.execution.ranks, recorder) if plan.derived.shard else nullcontext()
    tensors = nullcontext() if real else FakeTensorMode()
    with ranks, tensors, nullcontext() if real else cuda_rules(), recorder:
        if plan.derived.shard:
            model = make_empty_model(plan)
        else:  # the same on fake tensors, to which nothing can be given that was on no device
            model = GPT2(plan.shape, plan.config.dropout)
            model.cast_matrices(getattr(torch, plan.config.weights_dtype))
            configure(model, plan)
        if plan.config.lora_rank:
            add_adapters(model, plan.config.lora_rank, plan.derived.lora_alpha, plan.config.seed)
        for parameter in model.parameters():
            recorder.see(parameter, "weights")
            recorder.name(parameter, "weights")
        model.train()
        optimizer = make_optimizer(model, plan)
        update = make_optimizer_step(optimizer, plan)
        for _ in range(2):
            loss = torch.zeros(())
            for micro_step in range(min(plan.execution.grad_accum_steps, 2)):
                recorder.phase = "forward"
                batch = torch.zeros((plan.execution.micro_batch_size, plan.shape.block_size + 1), dtype=torch.int64)
                with autocast(plan):
                    micro_loss = model(batch[:, :-1], batch[:, 1:], 1.0 / plan.execution.grad_accum_steps)
                recorder.phase = "backward"
                update.before_backward(0, micro_step, 1e-3, micro_loss)
                micro_loss.backward()
                loss += micro_loss.detach()
                del micro_loss
            for parameter in model.parameters():
                if parameter.grad is not None:
                    recorder.name(parameter.grad, "gradients")
            recorder.phase = "optimizer"
            update(loss)
            for state in optimizer.state.values():
                for tensor in state.values():
                    recorder.see(tensor, "optimizer")
                    recorder.name(tensor, "optimizer")
        return recorder.peak()
