"""The optimizer step inside the backward pass: each gradient is used and freed as soon as it exists."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt2box.optim.loss_spikes import BadStepCounter
from gpt2box.optim.low_memory_adamw import LowMemoryAdamW


class InBackwardStep:
    """Applies each gradient to the optimizer state as soon as the backward pass has made it, then frees it.

    So the gradients of two tensors never exist at once. Gradients accumulate in the optimizer state: the squares of a
    step's k micro-steps are summed, in place of the square of their sum (AdamA, Zhang et al. 2023, arXiv:2305.19982).
    Where gradients are mostly noise, both are equal on average; where they are mostly signal, updates are up to √k
    larger. The global norm is known only after all weights have moved, so each tensor's gradient is clipped to
    grad_clip / √k in each micro-step. With one micro-step and a global norm below grad_clip, the step is plain
    AdamW's. A non-finite gradient counts as zero, as do all gradients of a micro-step whose loss is a spike.
    """

    def __init__(
        self, optimizer: LowMemoryAdamW, grad_clip: float, grad_accum_steps: int, device: torch.device
    ) -> None:
        self.optimizer, self.grad_accum_steps = optimizer, grad_accum_steps
        self.max_norm = grad_clip / grad_accum_steps**0.5  # of one tensor's gradient in one micro-step
        self.skip_note = "none reached the weights" if grad_accum_steps == 1 else "their gradients were left out"
        self.bad_steps = BadStepCounter(device)
        self._handles = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._make_hook(group)))

    def before_backward(self, step: int, micro_step: int, lr: float, micro_loss: Tensor) -> None:
        """Prepare for the backward pass of a micro-step, and find out whether its loss is a spike."""
        if micro_step == 0:
            self.optimizer.begin_step(step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self._squared_norm = torch.zeros_like(self.bad_steps.total)
            self._bad = torch.zeros_like(self.bad_steps.total)
            self._spike = torch.zeros_like(self._bad, dtype=torch.bool)
            self._spike_limit = self.bad_steps.spike_limit(self.grad_accum_steps) / self.grad_accum_steps
        loss = micro_loss.detach()
        finite, above = loss.isfinite(), loss > self._spike_limit
        self._micro_step, self._loss_is_good = micro_step, finite & ~above
        self._spike = self._spike | (finite & above)

    def __call__(self, loss: Tensor) -> Tensor:
        """End the step; returns the square root of the sum of squared gradients (a device scalar)."""
        self.optimizer.is_step_unfinished = False
        finite = (self._bad == 0) | self._spike
        self.bad_steps.record(loss, self.bad_steps.spike_limit(), self._bad, finite)
        return self._squared_norm.sqrt()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _make_hook(self, group: dict[str, Any]) -> Callable[[Tensor], None]:
        def apply_gradient(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
            good = (norm.isfinite() & self._loss_is_good).float()
            scale = (norm / self.max_norm).clamp(min=1.0) if self.max_norm else None
            is_last = self._micro_step == self.grad_accum_steps - 1
            self.optimizer.apply_gradient(parameter, group, grad, good, scale, self._micro_step == 0, is_last)
            parameter.grad = None
            self._squared_norm = self._squared_norm + torch.where(good == 0, norm, norm.square())
            self._bad = torch.maximum(self._bad, 1.0 - good)

        return apply_gradient
