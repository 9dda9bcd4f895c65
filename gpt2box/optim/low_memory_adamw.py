"""AdamW in less memory: averages in 8 bits, weights in bfloat16, a step inside the backward pass.

Each is a setting of its own. The averages in 8 bits and the bfloat16 weights change the numbers; so does a step inside
the backward pass where it accumulates or clips. What each costs in loss is in docs/memory.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gpt2box.distributed.fsdp import local, zeros
from gpt2box.optim.loss_spikes import BadSteps
from gpt2box.optim.quantization import BLOCK, dequantise, quantise, round_to_bfloat16

CHUNK = 8192 * BLOCK  # numbers updated at a time: their float32 copies are all the scratch space there is
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
ZERO_CODE = 127  # of the signed codes; of the others it is 0


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) that works through a tensor in chunks, with no scratch space of its size.

    `states` int8 keeps the averages of matrices in 8 bits; of the squares, the roots. Vectors' stay in float32, they
    are few. As PyTorch's fused AdamW, it divides gradients by `grad_scale` and leaves out a step with `found_inf`;
    and a group whose weights and averages are all in float32 it leaves to that one. Of tensors that are split over
    ranks (shards.py) it updates this rank's rows.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], states: str, seed: int):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.seed = seed
        self.generator: torch.Generator | None = None
        self.half_done = False  # some weights have taken the step, others not
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = empty_state(parameter, states)

    def begin(self, step: int) -> None:
        """Chance depends on seed and step alone, so a run that goes on rounds as one that was never interrupted."""
        self.half_done = False
        if self.generator is None:
            self.generator = torch.Generator(self.param_groups[0]["params"][0].device)
        drawn = hashlib.blake2b(f"{self.seed} {step}".encode(), digest_size=4)  # the CPU's generator takes 32 bits
        self.generator.manual_seed(int.from_bytes(drawn.digest(), "little"))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step with the gradients present; none of it where `found_inf`."""
        self.half_done = True
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            if "parts" not in group and all(self.is_plain(p) for p in present):
                self.fused_step(present, group)
                continue
            for parameter in present:
                grad = local(parameter.grad)
                good = 1.0 - self.found_inf if self.found_inf is not None else torch.ones_like(grad.sum())
                self.take(parameter, group, grad, good)
        self.half_done = False

    def take(self, parameter: Tensor, group: dict[str, Any], grad: Tensor, good: Tensor) -> None:
        """A whole step's gradient, or this rank's rows of it."""
        self.update(parameter, group, grad, good, self.grad_scale)

    def is_plain(self, parameter: Tensor) -> bool:
        """Weights and averages in float32."""
        return parameter.dtype == torch.float32 and self.state[parameter]["exp_avg"].dtype == torch.float32

    def fused_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW by PyTorch."""
        states = [local_state(self.state[p]) for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            [local(p) for p in parameters],
            [local(p.grad) for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    @torch.no_grad()
    def update(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        grad: Tensor,
        good: Tensor,
        scale: Tensor | None = None,
        first: bool = True,
        last: bool = True,
    ) -> None:
        """Take a gradient into the averages; decay these before if it is a step's first, move the weights if its last.

        Where `good` (0 or 1, a device scalar) is 0, a whole step changes nothing; a part of one counts as no gradient.
        """
        assert self.generator is not None, "begin() comes first"
        self.half_done = True
        state, (beta1, beta2) = local_state(self.state[parameter]), group["betas"]
        keep = (good == 0) if first and last else torch.zeros_like(good, dtype=torch.bool)
        if last:
            state["step"] += (~keep).float()
        # Of a step that is left out at the very beginning, 0: its quotient is not used.
        bias1, bias2 = (1 - beta ** state["step"].clamp(min=1) for beta in (beta1, beta2))
        weights, gradients = local(parameter).view(-1), grad.reshape(-1)
        for begin in range(0, weights.numel(), CHUNK):
            rows = slice(begin, begin + CHUNK)
            g = gradients[rows].float()
            g = torch.where(good == 0, 0.0, g if scale is None else g / scale)
            m, v = load(state, "exp_avg", rows), load(state, "exp_avg_sq", rows)
            if first:
                m, v = m * torch.where(keep, 1.0, beta1), v * torch.where(keep, 1.0, beta2)
            m = m.add_(g, alpha=1 - beta1)
            v = v.addcmul_(g, g, value=1 - beta2)
            if last:
                w = weights[rows].float()
                moved = w * (1 - group["lr"] * group["weight_decay"])
                moved -= group["lr"] * (m / bias1) / ((v / bias2).sqrt_() + group["eps"])
                moved = torch.where(keep, w, moved)
                weights[rows] = round_to_bfloat16(moved, self.generator) if weights.dtype == torch.bfloat16 else moved
            store(state, "exp_avg", rows, m, keep, self.generator)
            store(state, "exp_avg_sq", rows, v, keep, self.generator)


def empty_state(parameter: Tensor, states: str, keys: Iterable[str] = tuple(SIGNED)) -> dict[str, Tensor]:
    """Averages of zero."""
    state = {"step": torch.empty((), dtype=torch.float32, device=parameter.device)}
    for key in keys:
        if states == "int8" and parameter.dim() >= 2:
            state[key] = zeros(parameter.numel(), parameter, torch.uint8)
            state[f"{key}_scale"] = zeros(-(-parameter.numel() // BLOCK), parameter)
        else:
            state[key] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
    reset(state)
    return state


def local_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of averages that are split over ranks, this one's rows."""
    return {key: local(tensor) for key, tensor in state.items()}


def reset(state: dict[str, Tensor]) -> None:
    """As before the first step."""
    for key, tensor in state.items():
        tensor.fill_(ZERO_CODE if tensor.dtype == torch.uint8 and SIGNED[key] else 0)


def load(state: dict[str, Tensor], key: str, rows: slice) -> Tensor:
    """A part of an average, in float32; written to in place where it is kept so."""
    if state[key].dtype != torch.uint8:
        return state[key].view(-1)[rows]
    scales = state[f"{key}_scale"][rows.start // BLOCK : rows.stop // BLOCK]
    values = dequantise(state[key][rows], scales, SIGNED[key])
    return values if SIGNED[key] else values.square_()


def store(
    state: dict[str, Tensor], key: str, rows: slice, values: Tensor, keep: Tensor, generator: torch.Generator
) -> None:
    """The reverse; where `keep`, codes and scales stay as they are."""
    if state[key].dtype != torch.uint8:
        state[key].view(-1)[rows] = values
        return
    code, scales = quantise(values if SIGNED[key] else values.sqrt(), SIGNED[key], generator)
    blocks = slice(rows.start // BLOCK, rows.start // BLOCK + scales.numel())
    state[key][rows] = torch.where(keep, state[key][rows], code)
    state[f"{key}_scale"][blocks] = torch.where(keep, state[f"{key}_scale"][blocks], scales)


class StepInBackward:
    """Takes each gradient into the optimizer as soon as the backward pass has made it, and frees it.

    So no two tensors' gradients exist at a time, and accumulation happens in the averages themselves: the squares of a
    step's k micro-steps are added up in place of the square of their sum (AdamA, Zhang et al. 2023, arXiv:2305.19982).
    Where the step's gradient is mostly noise that is the same in the mean; where it is mostly signal, updates are up to
    √k larger. The global norm is known only when all weights have moved, so each tensor's gradient is held to
    grad_clip / √k in each micro-step. A step of one micro-step whose global norm is below grad_clip is plain AdamW's. A
    gradient that is not finite counts as none, and so do all of a micro-step whose loss is a spike.
    """

    def __init__(self, optimizer: LeanAdamW, grad_clip: float, grad_accum_steps: int, device: torch.device) -> None:
        self.optimizer, self.grad_accum_steps = optimizer, grad_accum_steps
        self.limit = grad_clip / grad_accum_steps**0.5
        self.left_out = "none reached the weights" if grad_accum_steps == 1 else "their gradients were left out"
        self.bad_steps = BadSteps(device)
        self._handles = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._taker(group)))

    def before_backward(self, step: int, micro_step: int, lr: float, micro_loss: Tensor) -> None:
        """Called before each backward pass."""
        if micro_step == 0:
            self.optimizer.begin(step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self._squares, self._bad = torch.zeros_like(self.bad_steps.all), torch.zeros_like(self.bad_steps.all)
            self._spike = torch.zeros_like(self._bad, dtype=torch.bool)
            self._limit = self.bad_steps.limit(self.grad_accum_steps) / self.grad_accum_steps
        loss = micro_loss.detach()
        finite, above = loss.isfinite(), loss > self._limit
        self._micro_step, self._loss_is_good = micro_step, finite & ~above
        self._spike = self._spike | (finite & above)

    def __call__(self, loss: Tensor) -> Tensor:
        """End the step; returns the root of the sum of squared gradients (a device scalar)."""
        self.optimizer.half_done = False
        self.bad_steps.count(loss, self.bad_steps.limit(), self._bad, (self._bad == 0) | self._spike)
        return self._squares.sqrt()

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _taker(self, group: dict[str, Any]) -> Any:
        def take(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
            good = (norm.isfinite() & self._loss_is_good).float()
            scale = (norm / self.limit).clamp(min=1.0) if self.limit else None
            last = self._micro_step == self.grad_accum_steps - 1
            self.optimizer.update(parameter, group, grad, good, scale, self._micro_step == 0, last)
            parameter.grad = None
            self._squares = self._squares + torch.where(good == 0, norm, norm.square())
            self._bad = torch.maximum(self._bad, 1.0 - good)

        return take
