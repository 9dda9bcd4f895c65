"""Weights in and out in the Hugging Face layout.

On disk: names begin with `transformer.` (the published files leave it out; both are read), the
linear layers of a block are stored transposed (Hugging Face's Conv1D), the embedding has
vocab_size rows, the output layer is the embedding. A model without biases is written with zero
biases, which are the same function; config.json then says so for our own reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2box.errors import BadInput, Damaged, why
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.lora import base_parameters, merge_adapter
from gpt2box.model.shape import ModelShape
from gpt2box.utils.files import check_regular, read_json

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PREFIX = "transformer."
# The causal mask, which old versions of transformers stored with the weights.
IGNORED_SUFFIXES = (".attn.bias", ".attn.masked_bias")
OUTPUT_LAYER = "lm_head.weight"  # the embedding once more, where it is stored


def hf_config(shape: ModelShape, dropout: float, end_of_text: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a checkpoint."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new" if shape.gelu == "tanh" else "gelu",
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.n_embd,
        "n_positions": shape.block_size,
        "n_ctx": shape.block_size,
        "n_inner": None,
        "vocab_size": shape.vocab_size,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "gpt2box": {"bias": shape.bias},
    }


def to_hf(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """A parameter (or a tensor of its shape, as an optimizer's average) as it is stored."""
    return hf_view(name, tensor, vocab_size).cpu().contiguous()


def hf_view(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """The same without a copy: where it lies, with its own strides."""
    if name == "wte.weight":
        tensor = tensor[:vocab_size]
    if name.endswith(TRANSPOSED):
        tensor = tensor.t()
    return tensor.detach()


def copy_from_hf(name: str, target: Tensor, stored: Tensor) -> None:
    """The reverse of `to_hub`, into an existing tensor; padding rows become zero."""
    if name.endswith(TRANSPOSED):
        stored = stored.t()
    target[: stored.size(0)].copy_(stored)
    target[stored.size(0) :].zero_()


def hf_state_dict(model: GPT2) -> dict[str, Tensor]:
    """All tensors of model.safetensors, copied; adapters are added in."""
    return {name: tensor.cpu().contiguous() for name, tensor in hf_tensors(model)}


def hf_tensors(model: GPT2, get: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterator[tuple[str, Tensor]]:
    """The same one after the other, not copied, numbers of more bytes first; with adapters, each sum is made here.

    `get`: what is taken of a parameter, where it is split over several ranks.
    """
    for name, parameter in sorted(base_parameters(model).items(), key=lambda item: -item[1].element_size()):
        tensor = hf_view(name, get(merge_adapter(model, name, parameter)), model.shape.vocab_size)
        yield PREFIX + name, tensor
        if not model.shape.bias and name.endswith("weight") and not name.endswith(("wte.weight", "wpe.weight")):
            yield PREFIX + name.removesuffix("weight") + "bias", torch.zeros(tensor.size(-1))


@torch.no_grad()
def load_hf_weights(
    model: GPT2, folder: Path, rows: int | None = None, tensors: Iterable[tuple[str, Tensor]] | None = None
) -> None:
    """Copy the weights in `folder` into the model, one tensor at a time. A shorter context takes the first positions.

    `rows`: tokens of the stored embedding, if not the model's. Rows that are too many are left out; those that lack
    become the mean of the others, so that new tokens begin as likely as the average one (Hewitt 2021). `tensors`: of
    a checkpoint of ours, read in another way; each need only be valid until the next.

    Raises:
        BadInput: pickled weights, or tensors that do not fit: which, expected, found.
        Damaged: a file is not safetensors, or has numbers that are not finite.
    """
    wanted = base_parameters(model)
    faults = []
    seen = set()
    ends: dict[str, Tensor] = {}  # the embedding and the output layer, mapped and not copied
    for key, tensor in tensors or stored_tensors(folder):
        name = key.removeprefix(PREFIX)
        if tensors is None and name in ("wte.weight", OUTPUT_LAYER):
            ends[name] = tensor
        if name == OUTPUT_LAYER:
            continue
        if name.endswith(IGNORED_SUFFIXES):
            continue
        if not model.shape.bias and name.endswith("bias"):
            continue  # written as zeros, see above
        target = wanted.get(name)
        if target is None or name in seen:
            faults.append(f"{key}: not in a GPT-2 of {model.shape.n_layer} layers")
            continue
        seen.add(name)
        check_finite(name, tensor, str(folder))
        faults += copy_if_shape_matches(model, name, target.data, tensor, rows or model.shape.vocab_size)
    faults += [f"{name}: missing" for name in wanted.keys() - seen]
    if len(ends) == 2 and not torch.equal(ends["wte.weight"], ends[OUTPUT_LAYER]):
        faults.append(
            f"{OUTPUT_LAYER}: found other numbers than wte.weight's; the output layer of a GPT-2 is its embedding"
        )
    if faults:
        shown = sorted(faults)[:8] + (["…"] if len(faults) > 8 else [])
        raise BadInput(f"the weights in {folder} do not fit:\n    " + "\n    ".join(shown), f"{model.shape}")


def check_finite(name: str, tensor: Tensor, where: str) -> None:
    """Whether all of a tensor are numbers that a network can calculate with.

    Raises:
        Damaged: one is not.
    """
    # A sum is a thirtieth of the work, and finite only where all are; of large numbers it may be endless all the same.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise Damaged(f"{where}: {name} has numbers that are not finite", "weights of a training that went well")


def copy_if_shape_matches(model: GPT2, name: str, target: Tensor, stored: Tensor, rows: int) -> list[str]:
    """Copy one tensor if its shape is right; returns the fault if not."""
    expected = list(target.t().shape if name.endswith(TRANSPOSED) else target.shape)
    if name == "wte.weight":
        expected[0] = rows
    if name == "wpe.weight" and stored.dim() == 2 and stored.size(0) > expected[0]:
        stored = stored[: expected[0]]
    if list(stored.shape) != expected:
        return [f"{name}: found {list(stored.shape)}, expected {expected}"]
    if not stored.is_floating_point():
        return [
            f"{name}: found numbers of type {str(stored.dtype).removeprefix('torch.')}, expected float32 or shorter"
        ]
    wanted = model.shape.vocab_size
    copy_from_hf(name, target, stored[:wanted] if name == "wte.weight" else stored)
    if name == "wte.weight" and wanted > rows:
        target[rows:wanted] = stored.float().mean(0).to(target)
    return []


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of model.safetensors, or of its shards, memory-mapped."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    elif index.exists():
        try:
            names = set(read_json(index)["weight_map"].values())
            if any(Path(name).name != name for name in names):
                raise ValueError("it leads out of the folder")
            files = sorted(folder / name for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{index} is damaged ({why(error)})") from error
    elif any(folder.glob("*.bin")):
        raise BadInput(
            f"{folder} has pickled weights, which can run any code and are not read",
            "model.safetensors",
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safe')\", if you trust their source",
        )
    else:
        raise BadInput(f"no weights in {folder}", "model.safetensors")
    for file in files:
        try:
            check_regular(file)
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118, not a dict
                    yield key, tensors.get_tensor(key)
        except PermissionError:
            raise
        except (SafetensorError, OSError, ValueError) as error:
            raise Damaged(f"{file} cannot be read: {error}", "a whole safetensors file", f"replace {file}") from error
