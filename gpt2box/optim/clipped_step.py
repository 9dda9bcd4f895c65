"""The optimizer step after the backward pass: gradient clipping, and no step from a non-finite or spiking loss."""

import torch
from torch import Tensor

from gpt2box.distributed.fsdp import combine_norms, local_shard
from gpt2box.optim.factory import Optimizer
from gpt2box.optim.in_backward import InBackwardStep
from gpt2box.optim.loss_spikes import BadStepCounter
from gpt2box.optim.low_memory_adamw import LowMemoryAdamW
from gpt2box.planner.run_plan import RunPlan


class ClippedStep:
    """An optimizer step that clips gradients and skips itself after a non-finite gradient or a loss spike.

    Clipping and skipping happen inside the fused kernel, through the two tensors that PyTorch's GradScaler uses
    (`grad_scale`, `found_inf`): no extra pass over the gradients, no wait for the device. The count of skipped steps
    stays on the device until the loop reads it.
    """

    skip_note = "none reached the weights"

    def __init__(
        self,
        optimizer: Optimizer,
        grad_clip: float,
        device: torch.device,
        keep_gradients: bool = False,
        sharded: bool = False,
    ) -> None:
        """Create the step. `keep_gradients`: zero gradients instead of freeing them, as DDP's buckets hold them."""
        self.optimizer, self.grad_clip = optimizer, grad_clip
        self.keep_gradients, self.sharded = keep_gradients, sharded
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.bad_steps = BadStepCounter(device)

    def before_backward(self, step: int, micro_step: int, lr: float, micro_loss: Tensor) -> None:
        """Prepare for the backward pass of a micro-step."""
        if isinstance(self.optimizer, LowMemoryAdamW):
            self.optimizer.begin_step(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def __call__(self, loss: Tensor) -> Tensor:
        """Take the step and free the gradients; returns their global norm (a device scalar)."""
        grads = [local_shard(p.grad) for p in self.parameters if p.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32)))
        if self.sharded:
            norm = combine_norms(norm)
        finite, spike_limit = norm.isfinite() & loss.isfinite(), self.bad_steps.spike_limit()
        bad = (~finite | (loss > spike_limit)).float()
        self.optimizer.grad_scale = (  # type: ignore[union-attr]  # gradients are divided by it
            (norm / self.grad_clip).clamp(min=1.0) if self.grad_clip else torch.ones_like(norm)
        )
        self.optimizer.found_inf = bad  # type: ignore[union-attr]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        self.bad_steps.record(loss, spike_limit, bad, finite)
        return norm

    def close(self) -> None:
        """Do nothing; InBackwardStep removes its hooks here."""


OptimizerStep = ClippedStep | InBackwardStep


def make_optimizer_step(optimizer: Optimizer, plan: RunPlan, bad_steps: BadStepCounter | None = None) -> OptimizerStep:
    """Make the object that turns gradients into a step, with new counters or `bad_steps` of a run so far."""
    device = torch.device(plan.derived.device)
    step: OptimizerStep
    if plan.config.optimizer_in_backward:
        assert isinstance(optimizer, LowMemoryAdamW)
        step = InBackwardStep(optimizer, plan.config.grad_clip, plan.execution.grad_accum_steps, device)
    else:
        keep_gradients = plan.execution.ranks > 1 and not plan.derived.shard
        step = ClippedStep(optimizer, plan.config.grad_clip, device, keep_gradients, sharded=plan.derived.shard)
    step.bad_steps = bad_steps or BadStepCounter.from_plan(plan)
    return step
