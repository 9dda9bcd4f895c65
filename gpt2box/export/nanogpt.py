"""Read and write nanoGPT checkpoints (ckpt.pt)."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2box.data import downloads
from gpt2box.data.tokenizer import Tokenizer, build_char_tokenizer, load_gpt2_tokenizer
from gpt2box.errors import BadInput, Damaged, describe_error, printable_line
from gpt2box.export.huggingface import write_huggingface
from gpt2box.export.publish import check_tensors, publish
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import check_finite
from gpt2box.model.shape import GPT2_PADDED_VOCAB_SIZE, GPT2_VOCAB_SIZE, ModelShape, parse_sizes
from gpt2box.utils.files import check_regular_file
from gpt2box.utils.paths import raw_dir

COMPILED_PREFIX = "_orig_mod."  # torch.compile puts it before every name
EXPECTED = "nanoGPT's ckpt.pt"


def import_nanogpt(path: Path, out: Path, text: Path | None, gelu: str) -> Path:
    """Convert a nanoGPT checkpoint to a Hugging Face folder, `out`, and read it back.

    `text` is needed for a character-level model: the text that nanoGPT prepared, whose sorted characters are the
    vocabulary. `gelu` is "none" for exact GELU or "tanh".

    Raises:
        BadInput: The file is not a nanoGPT checkpoint, or the text gives another vocabulary.
        Damaged: The file cannot be read, or has numbers that are not finite.
        VolumeUnwritable: There is no space or no permission.
    """
    content = read_checkpoint(path)
    shape = parse_shape(content["model_args"], gelu, path)
    tokenizer = choose_tokenizer(shape, text, path)
    stored = {
        name.removeprefix(COMPILED_PREFIX).removeprefix("transformer."): tensor
        for name, tensor in content["model"].items()
    }
    if len(stored) < len(content["model"]):
        raise BadInput(f"{path} has tensors twice, with and without {COMPILED_PREFIX}", "each once")
    model = GPT2.empty(ModelShape(**{**vars(shape), "vocab_size": tokenizer.vocab_size}), 0.0, "cpu")
    copy_weights(model, stored, shape.vocab_size, path)
    step, loss = content.get("iter_num"), content.get("best_val_loss")
    loss = loss.item() if isinstance(loss, Tensor) and loss.numel() == 1 else loss
    figures = [f"step {step}"] if type(step) is int else []
    figures += [f"best val_loss {loss:.4f}"] if isinstance(loss, float) else []
    card = f"# {out.name}\n\nImported from nanoGPT's {path.name}: {', '.join(figures) or 'no figures'}.\n"
    publish(out, lambda temporary: write_huggingface(temporary, model, tokenizer, "float32", card))
    return out


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a nanoGPT checkpoint with weights_only=True, so that its pickle cannot run code.

    Raises:
        BadInput: The file is not a nanoGPT checkpoint.
        Damaged: The file cannot be read.
        OSError: The path is not a regular file.
    """
    check_regular_file(path)
    try:
        is_zip = zipfile.is_zipfile(path)  # PyTorch before 1.6 wrote another format, which cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise Damaged(f"{path} cannot be read: {reason}", EXPECTED) from error
    except Exception as error:  # UnpicklingError; foreign bytes make PyTorch's reader raise almost anything
        raise BadInput(f"{path} is no checkpoint, or holds more than tensors and numbers", EXPECTED) from error
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise BadInput(f"{path} has no model and model_args", EXPECTED)
    model, sizes = content["model"], content["model_args"]
    if not isinstance(model, dict) or not isinstance(sizes, dict) or not all(isinstance(name, str) for name in model):
        raise BadInput(f"{path}: model is no dictionary of tensors, or model_args none of numbers", EXPECTED)
    for name, tensor in model.items():
        is_plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_plain or not tensor.is_floating_point():
            raise BadInput(f"{path}: {printable_line(name)} is not a floating-point tensor", EXPECTED)
    return content


def parse_shape(sizes: dict[str, Any], gelu: str, path: Path) -> ModelShape:
    """Return the model shape that nanoGPT's model_args describe. Raises BadInput: a size is missing or impossible."""
    try:
        return ModelShape(**parse_sizes(sizes), bias=sizes.get("bias") is not False, gelu=gelu)
    except ValueError as error:
        raise BadInput(f"{path}: model_args: {printable_line(str(error))}", "the sizes of a GPT-2") from error


def choose_tokenizer(shape: ModelShape, text: Path | None, path: Path) -> Tokenizer:
    """Return GPT-2's tokenizer, or the character tokenizer of `text`; nanoGPT's checkpoint holds none.

    Raises BadInput: the model's vocabulary is neither GPT-2's nor that of the text.
    """
    if text is None:
        if shape.vocab_size not in (GPT2_VOCAB_SIZE, GPT2_PADDED_VOCAB_SIZE):
            raise BadInput(
                f"{path} has a vocabulary of {shape.vocab_size:,}",
                f"{GPT2_VOCAB_SIZE:,} or {GPT2_PADDED_VOCAB_SIZE:,}, GPT-2's; or the text of a character-level model",
                f"gpt2box import {path} --text input.txt",
            )
        return load_gpt2_tokenizer(downloads.fetch(downloads.GPT2_RANKS, raw_dir()))
    try:
        tokenizer = build_char_tokenizer([text.read_text(encoding="utf-8")], end_of_text=False)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {text}: {describe_error(error)}", "plain text in UTF-8") from error
    if tokenizer.vocab_size != shape.vocab_size:
        raise BadInput(f"{text} has {tokenizer.vocab_size:,} different characters", f"{shape.vocab_size:,}, as {path}")
    return tokenizer


@torch.no_grad()
def copy_weights(model: GPT2, stored: dict[str, Tensor], rows: int, path: Path) -> None:
    """Copy the stored tensors into the model; of the embedding's `rows`, copy the first vocab_size.

    Raises:
        BadInput: Tensors are missing, unknown or of another shape; the message names them.
        Damaged: A tensor has numbers that are not finite.
    """
    parameters = dict(model.named_parameters())
    # .attn.bias is nanoGPT's causal mask, lm_head.weight is tied to the embedding.
    unknown = {
        name for name in stored.keys() - parameters.keys() if not name.endswith((".attn.bias", "lm_head.weight"))
    }
    faults = [f"{name}: not in this network" for name in unknown]
    for name, parameter in parameters.items():
        expected = list(parameter.shape)
        if name == "wte.weight":
            expected[0] = rows
        if name not in stored:
            faults.append(f"{name}: missing")
            continue
        check_finite(name, stored[name], str(path))
        if list(stored[name].shape) != expected:
            faults.append(f"{name}: found {list(stored[name].shape)}, expected {expected}")
        elif name == "wte.weight":
            parameter[: model.shape.vocab_size].copy_(stored[name][: model.shape.vocab_size])
            parameter[model.shape.vocab_size :].zero_()
        else:
            parameter.copy_(stored[name])
    if faults:
        raise BadInput(f"{path} does not fit:\n    " + "\n    ".join(sorted(faults)[:8]), "nanoGPT's GPT")


def write_nanogpt(path: Path, model: GPT2, state: dict[str, Any]) -> None:
    """Write a ckpt.pt that nanoGPT's sample.py can load, and read it back.

    `state` is the content of the checkpoint's state.json, for the step and best loss.
    """
    shape = model.shape
    weights = {f"transformer.{name}": p.detach().clone() for name, p in model.named_parameters()}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: shape.vocab_size].clone()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    sizes = {key: getattr(shape, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")}
    content = {
        "model": weights,
        "model_args": sizes | {"dropout": 0.0},
        "iter_num": state.get("step", 0),
        "best_val_loss": state.get("best_val_loss") or float("nan"),
        "config": {"dataset": "", "written_by": "gpt2box"},
    }
    torch.save(content, path)
    stored = torch.load(path, map_location="cpu", weights_only=True)["model"]
    check_tensors(weights, stored, 0.0, path)
