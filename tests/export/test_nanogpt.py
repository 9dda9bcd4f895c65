"""nanoGPT's ckpt.pt: `gpt2box import`, and `gpt2box export --format nanogpt`."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from gpt2box.data.tokenizer import Gpt2Tokenizer
from gpt2box.errors import BadInput, Damaged
from gpt2box.export.export import export_model
from gpt2box.export.nanogpt import import_nanogpt
from gpt2box.inference.model_loader import load_model
from gpt2box.model.gpt2 import GPT2
from tests.helpers.commands import Command
from tests.helpers.exports import save_random_model
from tests.helpers.settings import TINYSHAKESPEARE, options

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}


def nanogpt_state(vocab_size: int, bias: bool, prefix: str = "") -> dict[str, Tensor]:
    """Return weights by nanoGPT's names, large enough for exact and tanh GELU to differ."""
    generator = torch.Generator().manual_seed(5)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) * (0.3 if len(size) > 1 else 0.1)

    state = {"wte.weight": drawn(vocab_size, 32), "wpe.weight": drawn(32, 32), "ln_f.weight": 1 + drawn(32)}
    for layer in range(2):
        for name, size in {
            "attn.c_attn": (96, 32),
            "attn.c_proj": (32, 32),
            "mlp.c_fc": (128, 32),
            "mlp.c_proj": (32, 128),
        }.items():
            state[f"h.{layer}.{name}.weight"] = drawn(*size)
            if bias:
                state[f"h.{layer}.{name}.bias"] = drawn(size[0])
        for norm in ("ln_1", "ln_2"):
            state[f"h.{layer}.{norm}.weight"] = 1 + drawn(32)
            if bias:
                state[f"h.{layer}.{norm}.bias"] = drawn(32)
    if bias:
        state["ln_f.bias"] = drawn(32)
    found = {f"{prefix}transformer.{name}": tensor for name, tensor in state.items()}
    return found | {f"{prefix}lm_head.weight": state["wte.weight"]}


def write_checkpoint(path: Path, vocab_size: int, bias: bool = True, prefix: str = "", **changes: Any) -> Path:
    content = {
        "model": nanogpt_state(vocab_size, bias, prefix),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": {**SIZES, "vocab_size": vocab_size, "bias": bias, "dropout": 0.1},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.88),
        "config": {"dataset": "shakespeare_char"},
    }
    torch.save(content | changes, path)
    return path


def reference(state: dict[str, Tensor], ids: Tensor, approximate: str) -> Tensor:
    """Compute logits from the definition of GPT-2, without code of gpt2box."""
    w = {name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor for name, tensor in state.items()}
    T = ids.size(1)
    x = w["wte.weight"][ids] + w["wpe.weight"][:T]
    for layer in range(2):

        def get(name: str, layer: int = layer) -> tuple[Tensor, Tensor | None]:
            return w[f"h.{layer}.{name}.weight"], w.get(f"h.{layer}.{name}.bias")

        q, k, v = F.linear(F.layer_norm(x, (32,), *get("ln_1")), *get("attn.c_attn")).split(32, dim=2)
        q, k, v = (t.view(-1, T, 2, 16).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(16)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + F.linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, T, 32), *get("attn.c_proj"))
        wide = F.gelu(F.linear(F.layer_norm(x, (32,), *get("ln_2")), *get("mlp.c_fc")), approximate=approximate)
        x = x + F.linear(wide, *get("mlp.c_proj"))
    return F.layer_norm(x, (32,), w["ln_f.weight"], w.get("ln_f.bias")) @ w["wte.weight"].t()


@pytest.mark.parametrize("vocab_size", [50_257, 50_304])
@pytest.mark.parametrize("bias, prefix, gelu", [(True, "", "none"), (False, "_orig_mod.", "none"), (True, "", "tanh")])
@torch.inference_mode()
def test_an_imported_model_has_the_same_logits_in_gpt2box_and_transformers(
    tmp_path: Path, volumes: Path, vocab_size: int, bias: bool, prefix: str, gelu: str
) -> None:
    path = write_checkpoint(tmp_path / "ckpt.pt", vocab_size, bias, prefix)
    folder = import_nanogpt(path, tmp_path / "out", None, gelu)
    model, tokenizer = load_model(folder, "cpu")
    ids = torch.randint(0, 50_257, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = reference(nanogpt_state(vocab_size, bias), ids, gelu)[..., :50_257]
    assert isinstance(tokenizer, Gpt2Tokenizer)
    model.eval()
    assert (model.logits(model.hidden_states(ids)) - expected).abs().max() < 1e-4
    hf_model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (hf_model(ids).logits - expected).abs().max() < 1e-4
    other = reference(nanogpt_state(vocab_size, bias), ids, {"none": "tanh", "tanh": "none"}[gelu])[..., :50_257]
    assert (other - expected).abs().max() > 2e-4  # so the two forms of GELU are distinguishable


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_of_exact_gelu_gives_the_same_gradients(
    tmp_path: Path, volumes: Path, mode: str
) -> None:
    folder = import_nanogpt(write_checkpoint(tmp_path / "ckpt.pt", 50_257), tmp_path / "out", None, "none")
    grads = []
    ids = torch.arange(40).view(2, 20)
    for setting in ("none", mode):
        model: GPT2 = load_model(folder, "cpu")[0].double().train()
        model.activation_checkpointing = setting
        model(ids, ids.roll(-1, 1)).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all((a - b).abs().max() < 1e-15 for a, b in zip(*grads, strict=True))


def test_an_imported_character_model_trains_and_exports_the_same_weights(
    volumes: Path, tmp_path: Path, gpt2box: Command
) -> None:
    path = write_checkpoint(tmp_path / "ckpt.pt", 65)
    done = gpt2box("import", str(path), "--name", "nano", "--text", str(TINYSHAKESPEARE))
    folder = volumes / "models" / "nano"
    assert done.returncode == 0 and str(folder) in done.stdout, done.stderr
    assert json.loads((folder / "config.json").read_text())["activation_function"] == "gelu"
    tuned = gpt2box("train", *options(name="tuned", init_from="nano", n_layer=2, max_steps=2, eval_interval=2))
    assert tuned.returncode == 0, tuned.stderr
    best = volumes / "runs" / "tuned" / "checkpoints" / "last"
    assert json.loads((best / "config.json").read_text())["activation_function"] == "gelu"
    back = torch.load(export_model(folder, "nanogpt", None, tmp_path / "back.pt", ""), weights_only=True)
    before = torch.load(path, weights_only=True)
    assert back["model_args"] == {**before["model_args"], "dropout": 0.0}
    assert back["model"].keys() == before["model"].keys()
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in before["model"].items())


def test_an_exported_checkpoint_has_nanogpts_names_and_sizes(tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer) -> None:
    model, folder = save_random_model(tmp_path / "model", gpt2_tokenizer, bias=False)
    exported = export_model(folder, "nanogpt", None, tmp_path / "ckpt.pt", "")
    content = torch.load(exported, weights_only=True)
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 64,
        "block_size": 48,
        "vocab_size": 50_257,
        "bias": False,
        "dropout": 0.0,
    }
    assert content["model_args"] == sizes
    state = content["model"]
    assert torch.equal(
        state["transformer.h.1.attn.c_attn.weight"], dict(model.named_parameters())["h.1.attn.c_attn.weight"]
    )
    assert state["lm_head.weight"].shape == (50_257, 64) and "transformer.ln_f.bias" not in state


class Rogue:
    """Object whose pickle runs code when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


def test_a_file_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, volumes: Path) -> None:
    out = tmp_path / "out"

    def refused(path: Path, kind: type[BadInput] | type[Damaged], part: str, text: Path | None = None) -> None:
        with pytest.raises(kind) as raised:
            import_nanogpt(path, out, text, "none")
        assert part in str(raised.value), raised.value
        assert not out.exists()

    good = write_checkpoint(tmp_path / "good.pt", 65)
    refused(good, BadInput, "a vocabulary of 65")
    (tmp_path / "other.txt").write_text("abc")
    refused(good, BadInput, "3 different characters", tmp_path / "other.txt")
    state = nanogpt_state(65, True)
    state["transformer.h.0.attn.c_attn.weight"] = torch.zeros(4, 4)
    state["transformer.h.7.extra"] = torch.zeros(1)
    del state["transformer.ln_f.bias"]
    wrong = write_checkpoint(tmp_path / "wrong.pt", 65, model=state)
    refused(wrong, BadInput, "h.0.attn.c_attn.weight: found [4, 4], expected [96, 32]", TINYSHAKESPEARE)
    refused(wrong, BadInput, "h.7.extra: not in this network", TINYSHAKESPEARE)
    refused(wrong, BadInput, "ln_f.bias: missing", TINYSHAKESPEARE)
    (tmp_path / "torn.pt").write_bytes(good.read_bytes()[:2000])
    refused(tmp_path / "torn.pt", Damaged, "torn.pt cannot be read")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    refused(tmp_path / "foreign.pt", BadInput, "no model and model_args")
    torch.save({"model": Rogue(), "model_args": {}}, tmp_path / "rogue.pt")
    refused(tmp_path / "rogue.pt", BadInput, "no checkpoint, or holds more than tensors")
    older = tmp_path / "older.pt"  # the format before PyTorch 1.6, which cannot be mapped
    torch.save({"weights": 1}, older, _use_new_zipfile_serialization=False)
    refused(older, BadInput, "no model and model_args")
    for key, value in (("n_layer", 10**9), ("n_embd", math.inf), ("block_size", "32"), ("n_head", 3), ("n_layer", 0)):
        odd = write_checkpoint(tmp_path / "odd.pt", 65, model={}, model_args={**SIZES, "vocab_size": 65, key: value})
        refused(odd, BadInput, key, TINYSHAKESPEARE)
    odd_ones: list[Any] = [
        [],
        None,
        {5: torch.zeros(1)},
        {"a": 1},
        {"a": torch.zeros(1, device="meta")},
        {"a": torch.zeros(2).to_sparse()},
        {"a": torch.zeros(1, dtype=torch.int32)},
        {"a": torch.zeros(1, dtype=torch.bool)},
        {"a": torch.zeros(1, dtype=torch.complex64)},
    ]
    for model in odd_ones:
        refused(write_checkpoint(tmp_path / "odd.pt", 65, model=model), BadInput, "tensor", TINYSHAKESPEARE)
    twice = nanogpt_state(65, True) | nanogpt_state(65, True, "_orig_mod.")
    refused(write_checkpoint(tmp_path / "odd.pt", 65, model=twice), BadInput, "tensors twice", TINYSHAKESPEARE)
    (tmp_path / "passwd").write_bytes(Path("/etc/passwd").read_bytes())
    refused(tmp_path / "passwd", BadInput, "no checkpoint")
    state = nanogpt_state(65, True)
    state["transformer.ln_f.bias"][3] = math.nan
    endless = write_checkpoint(tmp_path / "endless.pt", 65, model=state)
    refused(endless, Damaged, "ln_f.bias has numbers that are not finite", TINYSHAKESPEARE)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises((BadInput, Damaged)):
        import_nanogpt(tmp_path / "pickle.pt", out, None, "none")
