"""Low-rank adapters, LoRA (Hu et al. 2021, arXiv:2106.09685): a layer with W becomes one with W + α/r · B·A.

W is frozen and may be bfloat16; only A (r, in) and B (out, r) of each linear layer of a block are trained, in float32.
B starts at zero, so training starts from the unchanged weights. An adapter is the submodule `lora` of its layer, which
`linear` in selective_recompute.py adds; model.safetensors stores the weights with the adapters merged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2box.model.gpt2 import GPT2

LORA_MARKER = ".lora."  # in the names of adapter parameters


class Adapter(nn.Module):
    """Computes what LoRA adds to the output of a layer."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        device = layer.weight.device
        self.a = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """Map the layer's input (…, in) to (…, out)."""
        return F.linear(F.linear(x, self.a) * self.scale, self.b)


@torch.no_grad()
def add_adapters(model: GPT2, rank: int, alpha: float, seed: int) -> None:
    """Freeze the model and add an adapter to each linear layer of the blocks; `rank` is at most n_embd.

    A is uniform in ±1/√in, as in the authors' code (a Kaiming initialisation with a = √5).
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in [module for module in model.h.modules() if isinstance(module, nn.Linear)]:
        adapter = Adapter(layer, rank, alpha)
        bound = layer.in_features**-0.5
        # drawn on the CPU, so that a seed gives the same adapters on any device
        adapter.a.copy_(torch.empty(adapter.a.shape).uniform_(-bound, bound, generator=generator))
        layer.lora = adapter


def lora_parameters(model: GPT2) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapters by name; empty for a model without adapters."""
    return {name: parameter for name, parameter in model.named_parameters() if LORA_MARKER in name}


def base_parameters(model: GPT2) -> dict[str, nn.Parameter]:
    """Return the parameters of the network by name, without those of the adapters."""
    return {name: parameter for name, parameter in model.named_parameters() if LORA_MARKER not in name}


@torch.no_grad()
def merge_adapter(model: GPT2, name: str, weight: Tensor) -> Tensor:
    """Return a parameter of the network with its adapter merged; float32 if the model has adapters."""
    if not lora_parameters(model):
        return weight
    weight = weight.float()
    module, _, kind = name.rpartition(".")
    adapter = getattr(model.get_submodule(module), "lora", None)
    return torch.addmm(weight, adapter.b, adapter.a, alpha=adapter.scale) if adapter and kind == "weight" else weight
