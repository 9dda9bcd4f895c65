"""Weights are read and written in Hugging Face's layout; unsuitable ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2box.data.pretrained import load_shape
from gpt2box.errors import BadInput, Damaged
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import hf_state_dict, load_hf_weights
from gpt2box.model.shape import ModelShape
from tests.helpers.models import saved, tiny_model


def load_in_transformers(model: GPT2, folder: Path) -> GPT2LMHeadModel:
    """Save a checkpoint and load it in transformers."""
    return GPT2LMHeadModel.from_pretrained(saved(model, folder), attn_implementation="eager").eval()


def token_ids(batch: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias", [True, False])
def test_saved_weights_load_bit_identically(tmp_path: Path, bias: bool) -> None:
    model = tiny_model(bias)
    folder = saved(model, tmp_path)
    assert load_shape(folder) == model.shape
    loaded = GPT2(load_shape(folder))
    load_hf_weights(loaded, folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_weights_saved_by_transformers_give_its_logits(tmp_path: Path, shard: str) -> None:
    reference = load_in_transformers(tiny_model(), tmp_path)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    model = GPT2(load_shape(tmp_path / "theirs"))
    load_hf_weights(model, tmp_path / "theirs")
    assert (model.logits(model.hidden_states(token_ids())) - reference(token_ids()).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_load_unchanged(tmp_path: Path, dtype: torch.dtype) -> None:
    reference = load_in_transformers(tiny_model(), tmp_path).to(dtype)
    reference.save_pretrained(tmp_path / "theirs")
    model = GPT2(load_shape(tmp_path / "theirs"))
    load_hf_weights(model, tmp_path / "theirs")
    assert (model.logits(model.hidden_states(token_ids())) - reference.float()(token_ids()).logits).abs().max() <= 1e-4


def test_an_architecture_other_than_gpt2_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    reference = load_in_transformers(tiny_model(), tmp_path)
    reference.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["scale_attn_by_inverse_layer_idx"] = True
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="scale_attn_by_inverse_layer_idx True"):
        load_shape(tmp_path / "theirs")
    state = hf_state_dict(tiny_model())
    for shift in (0.0, 0.1):
        state["lm_head.weight"] = state["transformer.wte.weight"] + shift
        save_file(state, tmp_path / "model.safetensors")
        if shift:
            with pytest.raises(BadInput, match="found other numbers than wte"):
                load_hf_weights(tiny_model(), tmp_path)
        else:
            load_hf_weights(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layer", 2.5, "n_layer is 2.5"),
        ("n_layer", True, "n_layer is True"),
        ("n_positions", 0, "block_size is 0"),
        ("vocab_size", 10**30, "vocab_size is 10"),
        ("n_head", 3, "no multiple of n_head 3"),
        ("n_embd", None, "n_embd is None"),
    ],
)
def test_invalid_sizes_in_config_json_are_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    path = saved(tiny_model(), tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(Damaged, match=message):
        load_shape(path.parent)


def test_a_shorter_context_uses_the_first_positions(tmp_path: Path) -> None:
    model = tiny_model()
    folder = saved(model, tmp_path)
    short = GPT2(ModelShape(3, 4, 32, 8, 101))
    load_hf_weights(short, folder)
    x = token_ids(length=8)
    assert torch.allclose(short.hidden_states(x), model.hidden_states(x))


def test_tensors_that_do_not_fit_are_named_and_pickled_weights_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = hf_state_dict(tiny_model())
    state["transformer.h.0.attn.c_attn.weight"] = torch.zeros(4, 4)
    state["transformer.h.9.extra"] = torch.zeros(1)
    del state["transformer.ln_f.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadInput) as raised:
        load_hf_weights(tiny_model(), tmp_path)
    text = str(raised.value)
    assert "h.0.attn.c_attn.weight: found [4, 4], expected [32, 96]" in text
    assert "transformer.h.9.extra: not in a GPT-2 of 3 layers" in text and "ln_f.bias: missing" in text

    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(Damaged):
        load_hf_weights(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickled weights"):
        load_hf_weights(tiny_model(), tmp_path)
