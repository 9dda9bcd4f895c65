"""Weights, gradients and averages split over the ranks of a run: PyTorch's FSDP2 (Zhao et al. 2023, arXiv:2304.11277).

Each rank keeps some rows of every tensor. A block's weights are put together before its forward and its backward pass
and dropped after it; its gradients are averaged over the ranks as they are made, each rank keeping its rows. What is
split is a DTensor; arithmetic on rows alone is done on `local` ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2box.model.gpt2 import GPT2


def split(model: GPT2, device: torch.device, ranks: int, compiled: bool) -> GPT2:
    """A network on the meta device becomes this rank's rows of it, without values; each block compiled by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    for block in model.h:
        if compiled:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    return model


def local(tensor: Tensor) -> Tensor:
    """This rank's rows; of a tensor that is not split, itself."""
    split_one: Any = tensor
    own: Tensor = split_one.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def whole(tensor: Tensor) -> Tensor:
    """All ranks' rows; called by all of them. Of a tensor that is not split, itself."""
    split_one: Any = tensor
    complete: Tensor = split_one.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return complete


def outline(tensor: Tensor) -> Tensor:
    """Shape, dtype and strides of the whole, without values."""
    if hasattr(tensor, "full_tensor"):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return tensor.to("meta")


def split_as(rows: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a tensor of the shape of `like`, as one that is split in the same way; or themselves."""
    if not hasattr(like, "to_local"):
        return rows
    from torch.distributed.tensor import DTensor

    split_one: Any = like
    mesh, placements = split_one.device_mesh, split_one.placements
    return DTensor.from_local(rows, mesh, placements, shape=like.shape, stride=like.stride(), run_check=False)


def rows_of(tensor: Tensor) -> slice:
    """Which rows this rank has."""
    split_one: Any = tensor
    if not hasattr(tensor, "to_local"):
        return slice(None)
    each = -(-tensor.size(0) // split_one.device_mesh.size())
    begin = each * split_one.device_mesh.get_local_rank()
    return slice(begin, begin + each)


def zeros(count: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A vector, split as `like` is, or on its device."""
    split_one: Any = like
    if not hasattr(like, "to_local"):
        return torch.zeros(count, dtype=dtype, device=like.device)
    from torch.distributed import tensor

    return tensor.zeros(count, dtype=dtype, device_mesh=split_one.device_mesh, placements=split_one.placements)


@torch.no_grad()
def deal(model: GPT2, optimizer: torch.optim.Optimizer, whole_ones: tuple[GPT2, torch.optim.Optimizer] | None) -> None:
    """Weights and averages from the first rank, which has them whole in host memory, to those that have their rows."""
    theirs = dict(whole_ones[0].named_parameters()) if whole_ones else {}
    for name, parameter in model.named_parameters():
        put(parameter, theirs.get(name))
        averages = whole_ones[1].state[theirs[name]] if whole_ones else {}
        for key, average in sorted(optimizer.state[parameter].items()):
            put(average, averages.get(key))


def put(target: Tensor, source: Tensor | None) -> None:
    """One tensor; `source`: all of it, on the first rank alone."""
    split_one: Any = target
    full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    if source is not None:
        full.copy_(source)
    if hasattr(target, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        local(target).copy_(distribute_tensor(full, split_one.device_mesh, split_one.placements).to_local())
    else:
        dist.broadcast(full, 0)
        target.copy_(full)


def norm_over_ranks(norm: Tensor) -> Tensor:
    """Of all rows, of the norms of each rank's; a device scalar, which nothing waits for."""
    squares = norm.square()
    dist.all_reduce(squares)
    return squares.sqrt()


def sum_over_ranks(total: Tensor, model: GPT2) -> Tensor:
    """Of a scalar of each rank's rows; where the model is not split, itself."""
    if is_split(model):
        dist.all_reduce(total)
    return total


def is_split(model: torch.nn.Module) -> bool:
    """Whether `split` was called on it."""
    return hasattr(model, "reshard")


def end_pass(model: GPT2) -> None:
    """After passes without a backward pass: that would drop the embedding, which is put together for all of a pass."""
    split_one: Any = model
    if is_split(model):
        split_one.reshard()
