"""A nanoGPT checkpoint (ckpt.pt) to a Hugging Face folder from which training, sampling and export go on."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2box.data import downloads, tokenizer
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.errors import BadInput, Damaged, printable, why
from gpt2box.export.export import publish, write_folder
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import check_finite
from gpt2box.model.shape import ModelShape, sizes_of
from gpt2box.utils.files import check_regular
from gpt2box.utils.paths import raw_dir

GPT2_VOCABULARY = 50_257
PADDED = 50_304  # what nanoGPT rounds it up to; the rows beyond stand for no token
COMPILED = "_orig_mod."  # before the names of a compiled model


def import_nanogpt(path: Path, out: Path, text: Path | None, gelu: str) -> Path:
    """Write the checkpoint's model to `out`, read it back and compare.

    `text`: of a model in characters, the text that nanoGPT prepared: its characters in order are the vocabulary.

    Raises:
        BadInput: not nanoGPT's, or of a vocabulary that the text does not give.
        Damaged: it cannot be read, or has numbers that are not finite.
        VolumeUnwritable: no space or no permission.
    """
    content = read(path)
    shape = shape_of(content["model_args"], gelu, path)
    words = words_of(shape, text, path)
    stored = {name.removeprefix(COMPILED).removeprefix("transformer."): t for name, t in content["model"].items()}
    if len(stored) < len(content["model"]):
        raise BadInput(f"{path} has tensors twice, with and without {COMPILED}", "each once")
    model = GPT2.empty(ModelShape(**{**vars(shape), "vocab_size": words.vocab_size}), 0.0, "cpu")
    fill(model, stored, shape.vocab_size, path)
    step, loss = content.get("iter_num"), content.get("best_val_loss")
    loss = loss.item() if isinstance(loss, Tensor) and loss.numel() == 1 else loss
    figures = [f"step {step}"] if type(step) is int else []
    figures += [f"best val_loss {loss:.4f}"] if isinstance(loss, float) else []
    card = f"# {out.name}\n\nImported from nanoGPT's {path.name}: {', '.join(figures) or 'no figures'}.\n"
    publish(out, lambda beside: write_folder(beside, model, words, "float32", card))
    return out


def read(path: Path) -> dict[str, Any]:
    """The checkpoint's content; of pickle, only what holds no code.

    Raises:
        BadInput: not nanoGPT's.
        Damaged: it cannot be read.
        OSError: see files.regular.
    """
    check_regular(path)
    try:
        mapped = zipfile.is_zipfile(path)  # older versions of PyTorch wrote another form
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise Damaged(f"{path} cannot be read: {reason}", "a ckpt.pt as nanoGPT wrote it") from error
    except Exception as error:  # UnpicklingError, and of foreign bytes whatever PyTorch's own reader comes to
        raise BadInput(
            f"{path} is no checkpoint, or holds more than tensors and numbers", "nanoGPT's ckpt.pt"
        ) from error
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise BadInput(f"{path} has no model and model_args", "nanoGPT's ckpt.pt")
    model, sizes = content["model"], content["model_args"]
    if not isinstance(model, dict) or not isinstance(sizes, dict) or not all(isinstance(name, str) for name in model):
        raise BadInput(f"{path}: model is no dictionary of tensors, or model_args none of numbers", "nanoGPT's ckpt.pt")
    for name, tensor in model.items():
        usual = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not usual or not tensor.is_floating_point():
            raise BadInput(f"{path}: {printable(name)} is no tensor of fractions", "nanoGPT's ckpt.pt")
    return content


def shape_of(sizes: dict[str, Any], gelu: str, path: Path) -> ModelShape:
    """The network, as nanoGPT describes it.

    Raises:
        BadInput: sizes are missing, or no network's.
    """
    try:
        return ModelShape(**sizes_of(sizes), bias=sizes.get("bias") is not False, gelu=gelu)
    except ValueError as error:
        raise BadInput(f"{path}: model_args: {printable(str(error))}", "the sizes of a GPT-2") from error


def words_of(shape: ModelShape, text: Path | None, path: Path) -> Tokenizer:
    """The tokenizer that nanoGPT's checkpoint does not hold.

    Raises:
        BadInput: neither GPT-2's vocabulary nor that of the text.
    """
    if text is None:
        if shape.vocab_size not in (GPT2_VOCABULARY, PADDED):
            raise BadInput(
                f"{path} has a vocabulary of {shape.vocab_size:,}",
                f"{GPT2_VOCABULARY:,} or {PADDED:,}, GPT-2's; or the text of a model in characters",
                f"gpt2box import {path} --text input.txt",
            )
        return tokenizer.from_ranks(downloads.fetch(downloads.GPT2_RANKS, raw_dir()))
    try:
        words = tokenizer.from_texts([text.read_text(encoding="utf-8")], end_of_text=False)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {text}: {why(error)}", "plain text in UTF-8") from error
    if words.vocab_size != shape.vocab_size:
        raise BadInput(f"{text} has {words.vocab_size:,} different characters", f"{shape.vocab_size:,}, as {path}")
    return words


@torch.no_grad()
def fill(model: GPT2, stored: dict[str, Tensor], rows: int, path: Path) -> None:
    """Copy every tensor; the embedding's first vocab_size of `rows`.

    Raises:
        BadInput: which do not fit.
        Damaged: numbers that are not finite.
    """
    wanted = dict(model.named_parameters())
    extra = {name for name in stored.keys() - wanted.keys() if not name.endswith((".attn.bias", "lm_head.weight"))}
    faults = [f"{name}: not in this network" for name in extra]
    for name, parameter in wanted.items():
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
