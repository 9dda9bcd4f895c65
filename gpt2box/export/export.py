"""A model for other programs: a clean Hugging Face folder, nanoGPT's ckpt.pt, or GGUF for llama.cpp and Ollama.

Each export is written beside its place, read back and compared with the model, and only then given its name.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpt2box.data.tokenizer import Tokenizer
from gpt2box.errors import BadInput, Damaged, VolumeUnwritable
from gpt2box.export.gguf import check_gguf, write_gguf, write_modelfile
from gpt2box.export.model_card import model_card
from gpt2box.inference.model_loader import load_model
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import hf_config, hf_state_dict
from gpt2box.utils.files import discard, fsync_dir, read_object
from gpt2box.utils.paths import fix_hint
from gpt2box.utils.progress import say

DTYPES = {
    "huggingface": ("float32", "float16", "bfloat16"),
    "nanogpt": ("float32",),
    "gguf": ("float16", "float32", "q8_0"),
}
LARGEST = {"float16": 65_504.0, "q8_0": 127 * 65_504.0}  # beyond it is infinity; bfloat16 reaches as far as float32
ROUNDING = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}  # of a number, at most
SMALLEST_NORMAL = 2**-14  # of float16; below it the steps are equal


def export(folder: Path, form: str, dtype: str | None, out: Path | None, licence: str, title: str = "") -> Path:
    """Write the model in `folder` for others; returns what was written. `title`: of the model card, if not the run's.

    Raises:
        BadInput: a format that has no such numbers or no such tokenizer, or cannot hold the weights, or a place that is
            taken.
        Damaged: what was read back is not the model.
        VolumeUnwritable: no space or no permission.
    """
    dtype = dtype or DTYPES[form][0]
    if dtype not in DTYPES[form]:
        raise BadInput(f"--format {form} in {dtype}", f"one of: {', '.join(DTYPES[form])}")
    model, words = load_model(folder, "cpu")
    model.eval()
    check_range(model, form, dtype)
    final = (out or usual_place(folder, form, dtype)).absolute()
    if form == "huggingface":
        card = model_card(folder, model.shape, licence, title, final.name)
        write = partial(write_folder, model=model, words=words, dtype=dtype, card=card)
    elif form == "nanogpt":
        write = partial(write_nanogpt, model=model, state=read_object(folder / "state.json"))
    else:
        check_gguf(model, words, dtype)
        if model.shape.gelu == "none":
            say("note: llama.cpp computes GELU in GPT-2's tanh form, this model exactly: it will differ a little")
        write = partial(write_gguf, model=model, words=words, dtype=dtype, title=final.stem)
    publish(final, write)
    if form == "gguf":
        write_modelfile(final, model.shape.block_size, form_of(folder))
    return final


def form_of(folder: Path) -> str:
    """How a prompt is put to a model: as in the instruction data that its run was trained on, else as it is."""
    dataset = read_object(folder.resolve().parent.parent / "manifest.json").get("dataset")
    form = dataset.get("template") if isinstance(dataset, dict) else None
    return form if isinstance(form, str) and '"' not in form else "{prompt}"


def check_range(model: GPT2, form: str, dtype: str) -> None:
    """Whether these numbers reach as far as the weights.

    Raises:
        BadInput: which are too large.
    """
    for name, parameter in model.named_parameters():
        if (largest := float(parameter.detach().abs().max())) > LARGEST.get(dtype, math.inf):
            other = "float32" if form == "gguf" else "bfloat16"
            raise BadInput(
                f"{name} has a number of {largest:,.6g}, which {dtype} cannot hold",
                f"numbers up to {LARGEST[dtype]:,.6g}",
                f"--dtype {other}",
            )


def publish(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder beside its place, and give it its name when that has worked.

    Raises:
        BadInput: the place is taken.
        VolumeUnwritable: no space or no permission.
    """
    if os.path.lexists(final):
        raise BadInput(f"{final} is there already", "a new name", "--out ANOTHER, or move it away")
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        discard(temporary)
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:  # a folder after its files
            fsync_dir(path)
        os.rename(temporary, final)
        fsync_dir(final.parent)
    except OSError as error:
        found = f"cannot write {final}: {error.strerror or error}"
        raise VolumeUnwritable(found, "free space and permission", fix_hint(final.parent)) from error
    finally:
        discard(temporary)


def usual_place(folder: Path, form: str, dtype: str) -> Path:
    """In the run's folder, or beside a folder that is no run's."""
    real = folder.resolve()
    of_run = real.parent.name == "checkpoints"
    name = real.parents[1].name if of_run else real.name
    place = real.parents[1] / "export" if of_run else real.parent
    return place / {"huggingface": f"{name}-{dtype}", "nanogpt": f"{name}.pt", "gguf": f"{name}-{dtype}.gguf"}[form]


def write_folder(folder: Path, model: GPT2, words: Tokenizer, dtype: str, card: str) -> None:
    """A Hugging Face folder without what only training needs."""
    folder.mkdir()
    number = getattr(torch, dtype)
    config = hf_config(model.shape, 0.0, words.end_of_text, number)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if words.end_of_text is not None:
        generation = {"bos_token_id": words.end_of_text, "eos_token_id": words.end_of_text, "do_sample": True}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    words.save(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    state = {name: tensor.to(number) for name, tensor in hf_state_dict(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors leaves it to its owner alone
    again, _ = load_model(folder, "cpu")
    compare(dict(model.named_parameters()), dict(again.named_parameters()), ROUNDING[dtype], folder)
    if dtype == "float32":
        ids = torch.arange(min(model.shape.block_size, 64))[None] % model.shape.vocab_size
        with torch.inference_mode():
            if not torch.equal(model.hidden_states(ids), again.hidden_states(ids)):
                raise Damaged(f"{folder} gives other logits than the model", "the same", "try again on another disk")


def write_nanogpt(path: Path, model: GPT2, state: dict[str, Any]) -> None:
    """A ckpt.pt that nanoGPT's sample.py reads: weights by its names, its linear layers as ours."""
    shape = model.shape
    names = {f"transformer.{name}": p.detach().clone() for name, p in model.named_parameters()}
    names["transformer.wte.weight"] = names["transformer.wte.weight"][: shape.vocab_size].clone()
    names["lm_head.weight"] = names["transformer.wte.weight"]
    sizes = {key: getattr(shape, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")}
    content = {
        "model": names,
        "model_args": sizes | {"dropout": 0.0},
        "iter_num": state.get("step", 0),
        "best_val_loss": state.get("best_val_loss") or float("nan"),
        "config": {"dataset": "", "written_by": "gpt2box"},
    }
    torch.save(content, path)
    again = torch.load(path, map_location="cpu", weights_only=True)["model"]
    compare(names, again, 0.0, path)


def compare(wanted: dict[str, Tensor], found: dict[str, Tensor], rounding: float, where: Path) -> None:
    """Whether all tensors are there and differ by rounding at most.

    Raises:
        Damaged: which does not.
    """
    for name, tensor in wanted.items():
        other = found.get(name)
        if other is None or other.shape != tensor.shape:
            raise Damaged(f"{where}: {name} was not written", f"a tensor {list(tensor.shape)}")
        bound = rounding * tensor.abs().clamp(min=SMALLEST_NORMAL)
        if not ((tensor - other.float()).abs() <= bound).all():
            raise Damaged(f"{where}: {name} is not what was written", "the same numbers", "try again on another disk")
