"""AdamW in less memory: 8-bit optimizer state, bfloat16 weights, and gradients applied one tensor at a time.

Each is a setting of its own. 8-bit state and bfloat16 weights change the result; a step inside the backward pass
(in_backward.py) does so if it accumulates or clips. docs/memory.md lists what each costs in loss.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gpt2box.distributed.fsdp import local_shard, zeros_sharded_like
from gpt2box.optim.quantization import BLOCK, dequantize, quantize, round_to_bfloat16

CHUNK = 8192 * BLOCK  # elements updated at a time; their float32 copies are the only scratch memory
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
ZERO_CODE = 127  # code of zero in the signed table; in the unsigned table it is 0


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) that updates a tensor in chunks, without scratch memory of the tensor's size.

    With `states` int8, the moments of matrices are stored in 8 bits, the second moment as its square root; those of
    vectors stay float32, as they are small. Like PyTorch's fused AdamW, it divides gradients by `grad_scale` and skips
    the step if `found_inf`; it calls the fused kernel for groups whose weights and moments are all float32. Each rank
    updates its own rows of tensors that are sharded.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], states: str, seed: int):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.seed = seed
        self.generator: torch.Generator | None = None
        self.is_step_unfinished = False  # some weights have taken the step, others not
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = init_state(parameter, states)

    def begin_step(self, step: int) -> None:
        """Seed stochastic rounding by seed and step, so that a resumed run rounds like an uninterrupted one."""
        self.is_step_unfinished = False
        if self.generator is None:
            self.generator = torch.Generator(self.param_groups[0]["params"][0].device)
        seed = hashlib.blake2b(f"{self.seed} {step}".encode(), digest_size=4)  # the CPU generator accepts 32 bits
        self.generator.manual_seed(int.from_bytes(seed.digest(), "little"))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step with the gradients present; change nothing if `found_inf`."""
        self.is_step_unfinished = True
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            is_float32 = all(p.dtype == self.state[p]["exp_avg"].dtype == torch.float32 for p in present)
            if "stacked" not in group and is_float32:
                self.fused_step(present, group)
                continue
            for parameter in present:
                grad = local_shard(parameter.grad)
                good = 1.0 - self.found_inf if self.found_inf is not None else torch.ones_like(grad.sum())
                self.update_parameter(parameter, group, grad, good)
        self.is_step_unfinished = False

    def update_parameter(self, parameter: Tensor, group: dict[str, Any], grad: Tensor, good: Tensor) -> None:
        """Apply the gradient of a full step, or this rank's rows of it."""
        self.apply_gradient(parameter, group, grad, good, self.grad_scale)

    def fused_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Run PyTorch's fused AdamW kernel."""
        states = [local_state(self.state[p]) for p in parameters]
        weights = [local_shard(p) for p in parameters]
        grads = [local_shard(p.grad) for p in parameters if p.grad is not None]
        moments, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        options: dict[str, Any] = {key: group[key] for key in ("lr", "weight_decay", "eps")}
        options |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "amsgrad": False, "maximize": False}
        options |= {"grad_scale": self.grad_scale, "found_inf": self.found_inf}
        adamw(weights, grads, moments, squares, [], steps, fused=True, **options)

    @torch.no_grad()
    def apply_gradient(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        grad: Tensor,
        good: Tensor,
        scale: Tensor | None = None,
        is_first: bool = True,
        is_last: bool = True,
    ) -> None:
        """Add a gradient to the moments: decay them first if it is the step's first, move the weights if its last.

        Where `good` (0 or 1, a device scalar) is 0, a full step changes nothing; one micro-step of several counts as a
        gradient of zero.
        """
        assert self.generator is not None, "call begin_step() first"
        self.is_step_unfinished = True
        state, (beta1, beta2) = local_state(self.state[parameter]), group["betas"]
        skip = (good == 0) if is_first and is_last else torch.zeros_like(good, dtype=torch.bool)
        if is_last:
            state["step"] += (~skip).float()
        # The step is 0 if the very first step is skipped; the quotient is not used then.
        bias1, bias2 = (1 - beta ** state["step"].clamp(min=1) for beta in (beta1, beta2))
        weights, gradients = local_shard(parameter).view(-1), grad.reshape(-1)
        for begin in range(0, weights.numel(), CHUNK):
            chunk = slice(begin, begin + CHUNK)
            g = gradients[chunk].float()
            g = torch.where(good == 0, 0.0, g if scale is None else g / scale)
            m, v = load_moment(state, "exp_avg", chunk), load_moment(state, "exp_avg_sq", chunk)
            if is_first:
                m, v = m * torch.where(skip, 1.0, beta1), v * torch.where(skip, 1.0, beta2)
            m = m.add_(g, alpha=1 - beta1)
            v = v.addcmul_(g, g, value=1 - beta2)
            if is_last:
                w = weights[chunk].float()
                moved = w * (1 - group["lr"] * group["weight_decay"])
                moved -= group["lr"] * (m / bias1) / ((v / bias2).sqrt_() + group["eps"])
                moved = torch.where(skip, w, moved)
                weights[chunk] = round_to_bfloat16(moved, self.generator) if weights.dtype == torch.bfloat16 else moved
            store_moment(state, "exp_avg", chunk, m, skip, self.generator)
            store_moment(state, "exp_avg_sq", chunk, v, skip, self.generator)


def init_state(parameter: Tensor, states: str, keys: Iterable[str] = tuple(SIGNED)) -> dict[str, Tensor]:
    """Allocate the optimizer state of a parameter, with zero moments."""
    state = {"step": torch.empty((), dtype=torch.float32, device=parameter.device)}
    for key in keys:
        if states == "int8" and parameter.dim() >= 2:
            state[key] = zeros_sharded_like(parameter, parameter.numel(), torch.uint8)
            state[f"{key}_scale"] = zeros_sharded_like(parameter, -(-parameter.numel() // BLOCK))
        else:
            state[key] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
    reset_state(state)
    return state


def local_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's rows of sharded optimizer state."""
    return {key: local_shard(tensor) for key, tensor in state.items()}


def reset_state(state: dict[str, Tensor]) -> None:
    """Set the state to that before the first step."""
    for key, tensor in state.items():
        tensor.fill_(ZERO_CODE if tensor.dtype == torch.uint8 and SIGNED[key] else 0)


def load_moment(state: dict[str, Tensor], key: str, chunk: slice) -> Tensor:
    """Return a chunk of a moment as float32; a view of the state where that is float32."""
    if state[key].dtype != torch.uint8:
        return state[key].view(-1)[chunk]
    scales = state[f"{key}_scale"][chunk.start // BLOCK : chunk.stop // BLOCK]
    values = dequantize(state[key][chunk], scales, SIGNED[key])
    return values if SIGNED[key] else values.square_()


def store_moment(
    state: dict[str, Tensor], key: str, chunk: slice, values: Tensor, skip: Tensor, generator: torch.Generator
) -> None:
    """Store a chunk of a moment. In 8 bits, leave codes and scales unchanged where `skip`."""
    if state[key].dtype != torch.uint8:
        state[key].view(-1)[chunk] = values
        return
    codes, scales = quantize(values if SIGNED[key] else values.sqrt(), SIGNED[key], generator)
    blocks = slice(chunk.start // BLOCK, chunk.start // BLOCK + scales.numel())
    state[key][chunk] = torch.where(skip, state[key][chunk], codes)
    state[f"{key}_scale"][blocks] = torch.where(skip, state[f"{key}_scale"][blocks], scales)
