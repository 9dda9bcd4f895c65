"""Conversion of weights from and to the layout of Hugging Face's GPT-2.

On disk, names begin with `transformer.` (the published files omit it; both are read), the linear layers of a block are
transposed (Hugging Face's Conv1D), the embedding has vocab_size rows and is also the output layer. A model without
biases is stored with biases of zero, which is the same function; config.json records it for loading.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2box.errors import BadInput, Damaged, describe_error
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.lora import base_parameters, merge_adapter
from gpt2box.model.shape import ModelShape
from gpt2box.utils.files import check_regular_file, read_json

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PREFIX = "transformer."
IGNORED_SUFFIXES = (".attn.bias", ".attn.masked_bias")  # causal masks, stored by old versions of transformers
OUTPUT_LAYER = "lm_head.weight"  # a second copy of the embedding in some files


def hf_config(shape: ModelShape, dropout: float, end_of_text: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of config.json."""
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


def hf_view(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """Return a view of a parameter, or of optimizer state of its shape, in the layout on disk."""
    if name == "wte.weight":
        tensor = tensor[:vocab_size]
    if name.endswith(TRANSPOSED):
        tensor = tensor.t()
    return tensor.detach()


def copy_from_hf(name: str, target: Tensor, stored: Tensor) -> None:
    """Copy a stored tensor into an existing one; rows of padding become zero."""
    if name.endswith(TRANSPOSED):
        stored = stored.t()
    target[: stored.size(0)].copy_(stored)
    target[stored.size(0) :].zero_()


def hf_state_dict(model: GPT2) -> dict[str, Tensor]:
    """Return copies of all tensors of model.safetensors, with adapters merged."""
    return {name: tensor.cpu().contiguous() for name, tensor in hf_tensors(model)}


def hf_tensors(model: GPT2, get: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield views of all tensors of model.safetensors, larger dtypes first; merges adapters one tensor at a time.

    `get` is applied to each parameter, to gather one that is sharded.
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
    """Copy the weights in `folder` into the model, one tensor at a time. A shorter context uses the first positions.

    `rows`: rows of the stored embedding, if not the model's vocab_size. Surplus rows are dropped; missing rows become
    the mean of the others, so that new tokens start as likely as the average token (Hewitt 2021).
    `tensors`: the tensors of a verified checkpoint; each is used before the next is read.

    Raises:
        BadInput: pickled weights, or tensors that do not fit: which, expected, found.
        Damaged: a file is not safetensors, or has numbers that are not finite.
    """
    parameters = base_parameters(model)
    faults = []
    seen = set()
    ends: dict[str, Tensor] = {}  # embedding and output layer, memory-mapped
    for key, tensor in tensors or stored_tensors(folder):
        name = key.removeprefix(PREFIX)
        if tensors is None and name in ("wte.weight", OUTPUT_LAYER):
            ends[name] = tensor
        if name == OUTPUT_LAYER:
            continue
        if name.endswith(IGNORED_SUFFIXES):
            continue
        if not model.shape.bias and name.endswith("bias"):
            continue  # zeros, see the module's docstring
        target = parameters.get(name)
        if target is None or name in seen:
            faults.append(f"{key}: not in a GPT-2 of {model.shape.n_layer} layers")
            continue
        seen.add(name)
        check_finite(name, tensor, str(folder))
        faults += copy_if_shape_matches(model, name, target.data, tensor, rows or model.shape.vocab_size)
    faults += [f"{name}: missing" for name in parameters.keys() - seen]
    if len(ends) == 2 and not torch.equal(ends["wte.weight"], ends[OUTPUT_LAYER]):
        faults.append(
            f"{OUTPUT_LAYER}: found other numbers than wte.weight's; the output layer of a GPT-2 is its embedding"
        )
    if faults:
        shown = sorted(faults)[:8] + (["…"] if len(faults) > 8 else [])
        raise BadInput(f"the weights in {folder} do not fit:\n    " + "\n    ".join(shown), f"{model.shape}")


def check_finite(name: str, tensor: Tensor, where: str) -> None:
    """Check that all values of a tensor are finite. Raises Damaged: one is not."""
    # The sum takes a thirtieth of the time. It is finite only if all values are, but large values may overflow it.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise Damaged(f"{where}: {name} has numbers that are not finite", "weights without NaN or infinity")


def copy_if_shape_matches(model: GPT2, name: str, target: Tensor, stored: Tensor, rows: int) -> list[str]:
    """Copy a stored tensor into a parameter if shape and dtype fit; otherwise return why not."""
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
    vocab_size = model.shape.vocab_size
    copy_from_hf(name, target, stored[:vocab_size] if name == "wte.weight" else stored)
    if name == "wte.weight" and vocab_size > rows:
        target[rows:vocab_size] = stored.float().mean(0).to(target)
    return []


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and memory-mapped tensor of model.safetensors or its shards.

    Raises:
        BadInput: there are no weights, or they are pickled.
        Damaged: a file is not safetensors.
    """
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
            raise Damaged(f"{index} is damaged ({describe_error(error)})") from error
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
            check_regular_file(file)
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118, not a dict
                    yield key, tensors.get_tensor(key)
        except PermissionError:
            raise
        except (SafetensorError, OSError, ValueError) as error:
            raise Damaged(f"{file} cannot be read: {error}", "an intact safetensors file", f"replace {file}") from error
