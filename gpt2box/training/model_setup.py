"""Create the model on its device, compile it, and initialize model and optimizer on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2box.checkpoint.metadata import verify_model_files
from gpt2box.config.schema import Config
from gpt2box.data.pretrained import load_shape
from gpt2box.distributed import fsdp
from gpt2box.distributed.group import RankGroup
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import load_hf_weights
from gpt2box.model.lora import add_adapters
from gpt2box.optim.factory import Optimizer, make_optimizer
from gpt2box.planner.run_plan import RunPlan
from gpt2box.system.host import explain_host_oom

MAX_COMPILED_PLANS = 64  # by default PyTorch silently stops compiling at the ninth


def make_empty_model(plan: RunPlan) -> GPT2:
    """Create the model of a plan with uninitialized weights, sharded if planned."""
    weights_dtype = getattr(torch, plan.config.weights_dtype)
    if plan.derived.shard:
        model = GPT2.on_meta_device(plan.shape, plan.config.dropout, weights_dtype)
        fsdp.shard_model(model, torch.device(plan.derived.device), plan.execution.ranks, plan.execution.compile)
    else:
        model = GPT2.empty(plan.shape, plan.config.dropout, plan.derived.device, weights_dtype)
    configure(model, plan)
    if plan.config.lora_rank:
        add_adapters(model, plan.config.lora_rank, plan.derived.lora_alpha, plan.config.seed)
    return model


def configure(model: GPT2, plan: RunPlan) -> None:
    """Apply the settings that trade memory for time."""
    model.activation_checkpointing = plan.execution.activation_checkpointing
    model.loss_chunk_tokens = plan.config.loss_chunk_tokens


class CompiledGPT2(nn.Module):
    """GPT-2 with its blocks compiled as one graph. The loss stays outside and runs chunk by chunk.

    Inside the graph, Inductor undoes the loss's chunks and keeps them all (0.5 to 4 GiB more at 4 to 16 × 1024
    tokens), unrolls them (93 s to compile 8 chunks, 36 s for 4), and PyTorch 2.4 does not compile it in bfloat16 at
    all: its addmm fusion adds a bfloat16 product to the float32 gradient.
    """

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model
        self.hidden_states = torch.compile(model.hidden_states, dynamic=False)

    def forward(self, ids: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        """Compute the same loss as GPT2.forward."""
        return self.model.loss(self.hidden_states(ids), targets, scale)


def compile_model(model: GPT2) -> CompiledGPT2:
    """Compile the model: once for each execution plan, never for sizes that vary.

    So the kernels, and with them the bits, are those of a run that began with that plan.
    """
    from torch._dynamo import config

    config.cache_size_limit = max(config.cache_size_limit, MAX_COMPILED_PLANS)
    # Do not split the graph at DDP buckets: older versions cannot, see RankGroup.wrap_ddp.
    config.optimize_ddp = False
    return CompiledGPT2(model)


def init_on_all_ranks(
    model: GPT2, optimizer: Optimizer, plan: RunPlan, group: RankGroup, initialize: Callable[[GPT2, Optimizer], None]
) -> None:
    """Call `initialize` on rank 0 and send the resulting weights and optimizer state to all ranks.

    If sharded, `initialize` gets an unsharded model and optimizer in the host memory of rank 0.

    Raises:
        MachineCannot: The host of rank 0 has too little memory for them.
        Gpt2boxError: Raised by `initialize`.
    """
    if not plan.derived.shard:
        group.run_on_rank0(lambda: initialize(model, optimizer))
        return group.broadcast_from_rank0(model, optimizer)
    unsharded: list[tuple[GPT2, Optimizer]] = []

    def initialize_unsharded() -> None:
        if torch.cuda.is_available():  # free the pinned staging buffer of the checkpoint writer before a rollback
            getattr(torch._C, "_host_emptyCache", lambda: None)()
        on_host = plan.with_derived(device="cpu", shard=False)
        with explain_host_oom("all weights and averages are made, to be dealt out"):
            full_model = make_empty_model(on_host)
            unsharded.append((full_model, make_optimizer(full_model, on_host)))
            initialize(*unsharded[0])

    group.run_on_rank0(initialize_unsharded)
    fsdp.scatter_from_rank0(model, optimizer, unsharded[0] if unsharded else None)


def init_weights(model: GPT2, config: Config, weights: Path | None) -> None:
    """Load the weights of a folder, or draw random ones from the seed."""
    if weights:
        verify_model_files(weights)
        load_hf_weights(model, weights, rows=load_shape(weights).vocab_size)
    else:
        model.init_weights(config.seed)
