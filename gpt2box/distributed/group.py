"""The ranks of one training run: PyTorch's DistributedDataParallel or FSDP2, started by torchrun.

Each rank trains on its share of a step's sequences. It holds all weights, or with `shard` some rows of each (fsdp.py);
gradients are averaged over the ranks, so all take the same step. Only rank 0 reads and writes the run folder; it
broadcasts what it decides. Control messages go over gloo from CPU to CPU, so they never wait for a GPU.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from gpt2box.distributed.fsdp import is_sharded
from gpt2box.errors import Gpt2boxError, TryAgain
from gpt2box.model.gpt2 import GPT2
from gpt2box.utils.ranks import SINGLE_PROCESS, RankInfo, rank_info

T = TypeVar("T")

GRADIENT_TIMEOUT = timedelta(minutes=30)  # for a rank that hangs; one that died is noticed at once
CONTROL_TIMEOUT = timedelta(days=7)  # the other ranks wait this long while rank 0 prepares a dataset


class RankGroup:
    """All ranks of a run. Every rank calls each method, in the same order; a single process pays nothing for it."""

    def __init__(self, ranks: RankInfo, control_group: Any = None) -> None:
        self.ranks, self.control_group = ranks, control_group

    @property
    def is_rank_0(self) -> bool:
        """Return whether this rank writes the run folder and prints."""
        return self.ranks.is_rank_0

    @property
    def is_single_process(self) -> bool:
        """Return whether there is no other rank."""
        return self.ranks.world_size == 1

    def run_on_rank0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on all ranks.

        Raises Gpt2boxError: as `function` does, on rank 0; the other ranks exit silently with the same exit code.
        """
        if self.is_single_process:
            return function()
        message: list[Any] = [None, 0]  # result, exit code
        failure = None
        if self.is_rank_0:
            try:
                message[0] = function()
            except Gpt2boxError as error:
                failure, message[1] = error, error.exit_code
        dist.broadcast_object_list(message, 0, group=self.control_group)
        if failure:
            raise failure
        if message[1]:
            raise SystemExit(message[1])
        result: T = message[0]
        return result

    def run_once_per_host(self, function: Callable[[], None]) -> None:
        """Call `function` on rank 0, then on one rank of each host (a shared disk already has the result)."""
        self.run_on_rank0(function)
        if not self.is_rank_0 and self.ranks.local_rank == 0:
            function()
        self.all_gather(None)

    def all_gather(self, value: T) -> list[T]:
        """Return each rank's value, in the order of the ranks."""
        if self.is_single_process:
            return [value]
        values: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks, in float64."""
        if self.is_single_process:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.control_group)
        return sums.tolist()

    def all_reduce_mean(self, loss: Tensor) -> Tensor:
        """Average a device scalar over all ranks, without waiting for the GPU."""
        if not self.is_single_process:
            dist.all_reduce(loss)
            loss /= self.ranks.world_size
        return loss

    @torch.no_grad()
    def broadcast_from_rank0(self, model: GPT2, optimizer: torch.optim.Optimizer) -> None:
        """Copy the weights and the optimizer state of rank 0 to all ranks."""
        if self.is_single_process:
            return
        states = [entry[key] for entry in optimizer.state.values() for key in sorted(entry)]
        for tensor in [*model.parameters(), *(value for value in states if isinstance(value, Tensor))]:
            dist.broadcast(tensor, 0)

    def wrap_ddp(self, model: GPT2, forward: Any) -> Any:
        """Wrap `forward`, the model or its compiled form, so that its backward pass averages gradients over the ranks.

        Compile before wrapping: that gives one graph with any activation checkpointing, and the all-reduce starts when
        the backward pass of the last micro-step is done. The gradients are allocated here, as views of DDP's buckets;
        allocated later, they would exist twice.
        """
        if self.is_single_process or is_sharded(model):
            return forward
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        device = next(model.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(forward, ids, gradient_as_bucket_view=True)

    def gradient_sync(self, forward: Any, is_last: bool) -> AbstractContextManager[None]:
        """Wrap a micro-step: DDP averages gradients only in the last one of a step, FSDP in each."""
        if self.is_single_process or is_last or is_sharded(forward):
            return nullcontext()
        no_sync: AbstractContextManager[None] = forward.no_sync()
        return no_sync


class NoOp:
    """Accept any call and do nothing: stands in for rank 0's display and files on the other ranks."""

    def __getattr__(self, name: str) -> NoOp:
        return self

    def __call__(self, *_: object, **__: object) -> None:
        pass


@contextmanager
def join_rank_group() -> Iterator[RankGroup]:
    """Connect to all ranks that torchrun started; without torchrun, yield a group of this process alone.

    Raises TryAgain: another rank is lost. torchrun then ends all ranks and, with --max-restarts, starts them again.
    """
    own = rank_info()
    if own.world_size == 1:
        yield RankGroup(SINGLE_PROCESS)
        return
    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=GRADIENT_TIMEOUT)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # CPU tensors always go over gloo
        unused = unused_store_prefix(store, own)
        dist.init_process_group(backend, store=unused, rank=rank, world_size=count, timeout=GRADIENT_TIMEOUT)
        yield RankGroup(own, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise TryAgain(
            f"rank {own.rank}: another rank is lost ({str(error).splitlines()[0].split('. ')[0]})",
            f"all {own.world_size} ranks",
            "the same command resumes from the last checkpoint; torchrun --max-restarts 3 repeats it by itself",
        ) from error
    dist.destroy_process_group()  # not after an error: it would wait for ranks that wait for this one


def unused_store_prefix(store: Store, own: RankInfo) -> Store:
    """Agree on a prefix of torchrun's store that no earlier attempt has used.

    Newer versions of torchrun keep one store over all restarts; gloo would find the addresses of dead ranks in it and
    wait for them forever (pytorch issue 135712). Rank 0 publishes a random prefix. Each other rank answers under it
    with a random token of its own, and proceeds once rank 0 has listed that token as seen.
    """
    token = uuid.uuid4().hex
    if own.is_rank_0:
        store.set("part", token)
        answers = [f"{token}/{rank}" for rank in range(1, own.world_size)]
        store.wait(answers, GRADIENT_TIMEOUT)
        store.set(f"{token}/seen", " ".join(store.get(answer).decode() for answer in answers))
        return PrefixStore(token, store)
    while True:
        prefix = store.get("part").decode()
        store.set(f"{prefix}/{own.rank}", token)
        if store.check([f"{prefix}/seen"]) and token in store.get(f"{prefix}/seen").decode():
            return PrefixStore(prefix, store)
        time.sleep(0.05)


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether the connection to another rank broke. Gloo has no exception class for it."""
    return isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo/", "NCCL"))
