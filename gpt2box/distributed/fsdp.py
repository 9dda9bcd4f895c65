"""Weights, gradients and optimizer state sharded over the ranks: PyTorch's FSDP2 (Zhao et al. 2023, arXiv:2304.11277).

Each rank holds some rows of every tensor. A block's weights are gathered before its forward and its backward pass and
freed after it; gradients are averaged over the ranks as they are made, each rank keeping its rows. A sharded tensor is
a DTensor; arithmetic that needs only this rank's rows runs on its `local_shard`. Unsharded tensors are accepted, too.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2box.model.gpt2 import GPT2


def shard_model(model: GPT2, device: torch.device, ranks: int, compiled: bool) -> GPT2:
    """Shard a network on the meta device and allocate this rank's rows; if `compiled`, compile each block by itself."""
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


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's rows."""
    dtensor: Any = tensor
    rows: Tensor = dtensor.to_local() if hasattr(tensor, "to_local") else tensor
    return rows


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather the rows of all ranks. Every rank must call it."""
    dtensor: Any = tensor
    full: Tensor = dtensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def meta_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor of the full shape, dtype and strides on the meta device, without values."""
    if hasattr(tensor, "full_tensor"):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return tensor.to("meta")


def shard_like(rows: Tensor, like: Tensor) -> Tensor:
    """Make a tensor that is sharded as `like` is from this rank's rows."""
    if not hasattr(like, "to_local"):
        return rows
    from torch.distributed.tensor import DTensor

    dtensor: Any = like
    mesh, placements = dtensor.device_mesh, dtensor.placements
    return DTensor.from_local(rows, mesh, placements, shape=like.shape, stride=like.stride(), run_check=False)


def local_rows(tensor: Tensor) -> slice:
    """Return the range of rows that this rank holds."""
    dtensor: Any = tensor
    if not hasattr(tensor, "to_local"):
        return slice(None)
    rows_per_rank = -(-tensor.size(0) // dtensor.device_mesh.size())
    begin = rows_per_rank * dtensor.device_mesh.get_local_rank()
    return slice(begin, begin + rows_per_rank)


def zeros_sharded_like(like: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a vector of zeros on the device of `like`, sharded as it is."""
    dtensor: Any = like
    if not hasattr(like, "to_local"):
        return torch.zeros(count, dtype=dtype, device=like.device)
    from torch.distributed import tensor

    return tensor.zeros(count, dtype=dtype, device_mesh=dtensor.device_mesh, placements=dtensor.placements)


@torch.no_grad()
def scatter_from_rank0(
    model: GPT2, optimizer: torch.optim.Optimizer, source: tuple[GPT2, torch.optim.Optimizer] | None
) -> None:
    """Copy weights and optimizer state from `source`, unsharded in the host memory of rank 0, to the ranks' shards.

    `source` is None on the other ranks.
    """
    parameters = dict(source[0].named_parameters()) if source else {}
    for name, parameter in model.named_parameters():
        scatter_tensor(parameter, parameters.get(name))
        source_state = source[1].state[parameters[name]] if source else {}
        for key, tensor in sorted(optimizer.state[parameter].items()):
            scatter_tensor(tensor, source_state.get(key))


def scatter_tensor(target: Tensor, source: Tensor | None) -> None:
    """Copy the full tensor `source`, present on rank 0 only, to the ranks' shards of `target`."""
    dtensor: Any = target
    full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    if source is not None:
        full.copy_(source)
    if hasattr(target, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        local_shard(target).copy_(distribute_tensor(full, dtensor.device_mesh, dtensor.placements).to_local())
    else:
        dist.broadcast(full, 0)
        target.copy_(full)


def combine_norms(norm: Tensor) -> Tensor:
    """Return the norm over all ranks from the norm of each rank's rows, as a device scalar, without waiting for it."""
    squares = norm.square()
    dist.all_reduce(squares)
    return squares.sqrt()


def sum_over_shards(total: Tensor, model: GPT2) -> Tensor:
    """Sum a scalar over the ranks if the model is sharded."""
    if is_sharded(model):
        dist.all_reduce(total)
    return total


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether `shard_model` was called on the model."""
    return hasattr(model, "reshard")


def reshard(model: GPT2) -> None:
    """Free the gathered embedding after forward passes without a backward pass, which would free it."""
    sharded: Any = model
    if is_sharded(model):
        sharded.reshard()
