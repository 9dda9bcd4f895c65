"""What a step costs besides its arithmetic: graphs, waiting for the device, operations that are launched."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2box.checkpoint.metadata import TrainState
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.lora import add_adapters
from gpt2box.model.shape import ModelShape
from gpt2box.optim.factory import make_optimizer
from gpt2box.planner.memory import max_evaluation_batch
from gpt2box.training.evaluate import autocast
from gpt2box.training.model_setup import configure
from gpt2box.training.step import StepExecutor
from tests.helpers.memory_simulator import Recorder, cuda_rules
from tests.helpers.plans import planned, shape_of

SHAPE = ModelShape(2, 4, 64, 32, 300)
# The host waits for the device: it reads a value, has to know a size, or makes a tensor of a number of its own.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "lift_fresh")
READS = (Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__)
# Views and the like launch nothing.
FREE = (
    "view", "t", "transpose", "permute", "detach", "expand", "slice", "unsqueeze", "squeeze", "select", "alias",
    "split", "_unsafe_view", "as_strided", "unbind", "empty", "empty_like", "_reshape_alias", "reshape", "new_empty",
    "promote_types",
)  # fmt: skip


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(("dtype", "dropout"), [("float32", 0.0), ("bfloat16", 0.1)])
def test_forward_pass_and_loss_are_one_graph(mode: str, dtype: str, dropout: float) -> None:
    plan, _ = planned(SHAPE, 4, mode, dtype, dropout=dropout, loss_chunk_tokens=48)
    torch._dynamo.reset()
    model = GPT2(SHAPE, dropout)
    configure(model, plan)
    ids = torch.zeros((4, 32), dtype=torch.int64)
    with autocast(plan):
        found = torch._dynamo.explain(model.train())(ids, ids, 0.5)  # type: ignore[no-untyped-call]
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_with_adapters_too_and_the_backward_pass_is_one_graph_of_the_same_cut() -> None:
    torch._dynamo.reset()
    graphs: list[str] = []

    def count(name: str) -> Any:
        def compiler(graph: Any, inputs: Any) -> Any:
            graphs.append(name)
            return make_boxed_func(graph.forward)

        return compiler

    model = GPT2(SHAPE)
    add_adapters(model, 4, 8.0, 0)
    backend = aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"))  # type: ignore[no-untyped-call]
    ids = torch.zeros((4, 32), dtype=torch.int64)
    compiled = torch.compile(model.train(), backend=backend)
    for _ in range(2):  # the second step takes the same graphs
        compiled(ids, ids, 0.5).backward()
    assert graphs == ["forward", "backward"]


class Launches(TorchDispatchMode):
    """Counts operations that a GPU would launch kernels for, and those that wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name, *_ = str(func).split(".")
        if name in WAITS:
            self.waits.append(name)
        if space == "aten" and name not in FREE:
            self.launched[name] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes what would bring a tensor to the host. On the CPU no operation tells that."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.moves = 0  # to the device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.found.append(func.__name__)
        if func is Tensor.to and any(
            isinstance(value, torch.device | str) for value in (*args, *(kwargs or {}).values())
        ):
            self.moves += 1
        return func(*args, **(kwargs or {}))


def step_cost(
    micro_steps: int, mode: str = "none", dtype: str = "bfloat16", layers: int = 2, **settings: object
) -> Launches:
    """A step in its steady state as a GPU takes it, on tensors without data: reading a value of one is an error."""
    shape = replace(SHAPE, n_layer=layers)
    plan, _ = planned(shape, 4, mode, dtype, accumulation=micro_steps, **settings)
    with FakeTensorMode(), cuda_rules():
        model = GPT2(shape, plan.config.dropout).train()
        model.cast_matrices(getattr(torch, plan.config.weights_dtype))
        configure(model, plan)
        optimizer = make_optimizer(model, plan)
        dataset: Any = SimpleNamespace(masked=False)
        steps = StepExecutor(plan, model, optimizer, dataset, TrainState())

        def batches() -> Any:
            while True:
                yield torch.zeros((4, SHAPE.block_size + 1), dtype=torch.int32)

        steps.batches = batches()
        steps.take()
        with Launches() as launches, Reads() as reads:
            result = steps.take()
        launches.waits += reads.found
        assert reads.moves == micro_steps  # each batch, to the device
        assert isinstance(result.loss, Tensor) and isinstance(
            result.grad_norm, Tensor
        )  # the loop reads them when it logs, not before
    return launches


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dropout": 0.1},
        {"optimizer_states": "int8"},
        {"weights_dtype": "bfloat16"},
        {"optimizer": "muon"},
        {"optimizer": "muon", "optimizer_states": "int8", "weights_dtype": "bfloat16"},
    ],
)
def test_a_step_never_waits_for_the_device(mode: str, settings: dict[str, object]) -> None:
    assert step_cost(3, mode, **settings).waits == []


# Of 2 layers, not compiled, in float32, with one chunk of the loss: 108 of a micro-step itself, of which a layer has
# 30; 42 of the step: norm, clipping, guard, fused AdamW, and twelve to see a spike of the loss and count it; and from
# the second micro-step on 30 sums in place, a gradient each. A rise is paid in every step of every run: find what
# brought it before changing a number.
A_MICRO_STEP, A_LAYER, A_STEP, SUMS = 108, 30, 42, 30


def test_a_step_launches_no_more_operations_than_it_did() -> None:
    one, three = (sum(step_cost(count, dtype="float32").launched.values()) for count in (1, 3))
    assert one <= A_STEP + A_MICRO_STEP and three <= A_STEP + 3 * A_MICRO_STEP + 2 * SUMS
    layers = [sum(step_cost(1, layers=count, dtype="float32").launched.values()) for count in (2, 3)]
    assert layers[1] - layers[0] <= A_LAYER  # the update's do not grow with the number of tensors


@pytest.mark.parametrize(
    ("name", "micro_batch_size", "mode", "dtype"), [("gpt2", 4, "none", "bfloat16"), ("gpt2-xl", 2, "full", "float32")]
)
def test_an_evaluation_takes_no_more_memory_than_a_step_does(
    name: str, micro_batch_size: int, mode: str, dtype: str
) -> None:
    shape = replace(shape_of(name), n_layer=4)
    plan, way = planned(shape, micro_batch_size, mode, dtype)
    count = max_evaluation_batch(shape, dtype, plan.config.loss_chunk_tokens, way.memory.components())
    assert count > micro_batch_size
    with FakeTensorMode(), cuda_rules(), Recorder() as recorder:
        model = GPT2(shape).eval()
        configure(model, plan)
        for parameter in model.parameters():
            recorder.see(parameter, "weights")
        batch = torch.zeros((count, shape.block_size + 1), dtype=torch.int32)
        with torch.no_grad(), autocast(plan):
            model(batch[:, :-1], batch[:, 1:])
        taken = recorder.peak().allocated + way.memory.optimizer
    assert 0.8 * way.memory.allocated <= taken <= way.memory.allocated
