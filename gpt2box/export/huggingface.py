"""Write a model as a Hugging Face folder, without what only training needs."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from gpt2box.data.tokenizer import Tokenizer
from gpt2box.errors import Damaged
from gpt2box.export.publish import check_tensors
from gpt2box.inference.model_loader import load_model
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import hf_config, hf_state_dict

ROUNDING = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}  # largest relative rounding error


def write_huggingface(folder: Path, model: GPT2, tokenizer: Tokenizer, dtype: str, card: str) -> None:
    """Write the folder and load it back: equal weights up to rounding, and in float32 equal hidden states.

    `card` is the text of README.md.

    Raises Damaged: the model that was loaded back differs.
    """
    folder.mkdir()
    torch_dtype = getattr(torch, dtype)
    config = hf_config(model.shape, 0.0, tokenizer.end_of_text, torch_dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer.end_of_text is not None:
        generation = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text, "do_sample": True}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    state = {name: tensor.to(torch_dtype) for name, tensor in hf_state_dict(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors writes mode 600
    loaded, _ = load_model(folder, "cpu")
    check_tensors(dict(model.named_parameters()), dict(loaded.named_parameters()), ROUNDING[dtype], folder)
    if dtype == "float32":
        ids = torch.arange(min(model.shape.block_size, 64))[None] % model.shape.vocab_size
        with torch.inference_mode():
            if not torch.equal(model.hidden_states(ids), loaded.hidden_states(ids)):
                raise Damaged(f"{folder} gives other logits than the model", "the same", "try again on another disk")
