"""Several processes as one training run: PyTorch's DistributedDataParallel, started by torchrun.

Each rank takes its share of a step's sequences and holds all weights, or with `shard` some rows of each (shards.py);
gradients are averaged between them before a step, so all take the same one. The first rank alone reads and writes the
run's folder; what it decides the others are sent. Words between ranks go over gloo, from one CPU to the other, so that
no GPU is waited for.
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

from gpt2box.distributed.fsdp import is_split
from gpt2box.errors import Gpt2boxError, TryAgain
from gpt2box.model.gpt2 import GPT2
from gpt2box.utils.ranks import ALONE, Ranks, ranks
from gpt2box.utils.signals import StopRequest

T = TypeVar("T")

GRADIENTS_WAIT = timedelta(minutes=30)  # for a rank that says nothing more; one that died is noticed at once
WORDS_WAIT = timedelta(days=7)  # while the first rank prepares a dataset


class Group:
    """All ranks of a run. Each method is called by all of them, in the same order; of one alone it costs nothing."""

    def __init__(self, ranks: Ranks, words: Any = None) -> None:
        self.ranks, self.words = ranks, words

    @property
    def first(self) -> bool:
        """Whether this rank speaks and writes."""
        return self.ranks.first

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.ranks.count == 1

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all.

        Raises:
            Gpt2boxError: as `make` does, on the first rank; the others end with its exit code and without a word.
        """
        if self.alone:
            return make()
        made: list[Any] = [None, 0]
        fault = None
        if self.first:
            try:
                made[0] = make()
            except Gpt2boxError as error:
                fault, made[1] = error, error.exit_code
        dist.broadcast_object_list(made, 0, group=self.words)
        if fault:
            raise fault
        if made[1]:
            raise SystemExit(made[1])
        result: T = made[0]
        return result

    def on_each_machine(self, bring: Callable[[], None]) -> None:
        """First where the first rank is, then, should that not be the same disk, by one rank of each other machine."""
        self.from_first(bring)
        if not self.first and self.ranks.local == 0:
            bring()
        self.gathered(None)

    def gathered(self, value: T) -> list[T]:
        """Each rank's value, in order."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.ranks.count
        dist.all_gather_object(values, value, group=self.words)
        return values

    def sums(self, *values: float) -> list[float]:
        """Over all ranks, in double precision."""
        if self.alone:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self.words)
        return summed.tolist()

    def mean(self, loss: Tensor) -> Tensor:
        """Of a device scalar; on a GPU nothing waits for it."""
        if not self.alone:
            dist.all_reduce(loss)
            loss /= self.ranks.count
        return loss

    @torch.no_grad()
    def send(self, model: GPT2, optimizer: torch.optim.Optimizer) -> None:
        """Weights and averages of the first rank to all."""
        if self.alone:
            return
        averages = [entry[key] for entry in optimizer.state.values() for key in sorted(entry)]
        for tensor in [*model.parameters(), *(value for value in averages if isinstance(value, Tensor))]:
            dist.broadcast(tensor, 0)

    def parallel(self, model: GPT2, forward: Any) -> Any:
        """`forward`, the model itself or compiled, so that its backward pass averages gradients over the ranks.

        It is compiled before it is wrapped: one graph, whatever the recompute; the averages then begin when the last
        micro-step's backward pass is done. Gradients exist from now on, as parts of the buckets that are sent: made
        later, they would be there twice.
        """
        if self.alone or is_split(model):
            return forward
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        device = next(model.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(forward, ids, gradient_as_bucket_view=True)

    def micro_step(self, forward: Any, last: bool) -> AbstractContextManager[None]:
        """Around a forward and backward pass: gradients are averaged in a step's last alone; split ones, in each."""
        if self.alone or last or is_split(forward):
            return nullcontext()
        unsent: AbstractContextManager[None] = forward.no_sync()
        return unsent


class Silence:
    """Stands for the first rank's display on the others: takes any call, and does nothing."""

    def __getattr__(self, name: str) -> Silence:
        return self

    def __call__(self, *_: object, **__: object) -> None:
        pass


class Agreed:
    """What depends on signals and clocks, decided by all ranks at the same step, whichever of them saw it first.

    Once a step each rank says what it saw, and reads what was said a step ago: that has long arrived.
    """

    def __init__(self, stop: StopRequest, group: Group) -> None:
        self._stop, self._group = stop, group
        self._said = torch.zeros(2, dtype=torch.int64)
        self._sent: Any = None
        self._agreed = False
        self.late = False  # it is time for a checkpoint

    @property
    def stop(self) -> bool:
        """Whether all stop at this step."""
        return bool(self._stop) if self._group.alone else self._agreed

    def look(self, late: bool) -> None:
        """Called by all ranks once a step; `late`: whether this one would save."""
        self.late = late
        if self._group.alone:
            return
        self.settle()
        stop, self.late = map(bool, self._said.tolist())
        if stop:
            self._agreed = True
            self._stop.name = self._stop.name or "a signal to another rank"
            return
        self._said = torch.tensor([bool(self._stop), late and not self.late], dtype=torch.int64)
        self._sent = dist.all_reduce(self._said, dist.ReduceOp.MAX, group=self._group.words, async_op=True)

    def settle(self) -> None:
        """Wait for what is under way."""
        if self._sent is not None:
            self._sent.wait()
            self._sent = None


@contextmanager
def joined() -> Iterator[Group]:
    """All the ranks that torchrun started, or this process alone.

    Raises:
        TryAgain: another rank is lost. torchrun ends those that are left and, with --max-restarts, starts all again.
    """
    own = ranks()
    if own.count == 1:
        yield Group(ALONE)
        return
    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=GRADIENTS_WAIT)))
        # CPU tensors go over gloo also where there are GPUs.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        fresh = fresh_corner(store, own)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=count, timeout=GRADIENTS_WAIT)
        yield Group(own, dist.new_group(backend="gloo", timeout=WORDS_WAIT))
    except RuntimeError as error:
        if not lost(error):
            raise
        raise TryAgain(
            f"rank {own.rank}: another rank is lost ({str(error).splitlines()[0].split('. ')[0]})",
            f"all {own.count} ranks",
            "the same command goes on from the last checkpoint; torchrun --max-restarts 3 gives it by itself",
        ) from error
    # Not after a fault: it would wait for ranks that wait for this one.
    dist.destroy_process_group()


def fresh_corner(store: Store, own: Ranks) -> Store:
    """A part of torchrun's store where nothing is left from an earlier attempt.

    Newer torchruns keep one store over all restarts, in which gloo would find the addresses of the dead and wait for
    them for ever (pytorch issue 135712). The first rank names the part by a new word; each other adds a new word of its
    own, and begins when it reads that among those that the first has seen.
    """
    word = uuid.uuid4().hex
    if own.first:
        store.set("part", word)
        others = [f"{word}/{rank}" for rank in range(1, own.count)]
        store.wait(others, GRADIENTS_WAIT)
        store.set(f"{word}/seen", " ".join(store.get(other).decode() for other in others))
        return PrefixStore(word, store)
    while True:
        part = store.get("part").decode()
        store.set(f"{part}/{own.rank}", word)
        if store.check([f"{part}/seen"]) and word in store.get(f"{part}/seen").decode():
            return PrefixStore(part, store)
        time.sleep(0.05)


def lost(error: RuntimeError) -> bool:
    """Whether a rank's connection to another broke. Gloo has no class of exceptions for it."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo/", "NCCL"))
