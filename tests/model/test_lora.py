"""LoRA adapters: their gradients, what training changes, what a checkpoint holds, how a run resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gpt2box.checkpoint import retention
from gpt2box.checkpoint.loader import load_weights
from gpt2box.data.pretrained import load_shape
from gpt2box.errors import BadInput
from gpt2box.model.decoder import Decoder, KVCache
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.lora import add_adapters, base_parameters, lora_parameters, merge_adapter
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.models import tiny_model
from tests.helpers.settings import TINY

LORA = {"init_from": "first", "lora_rank": 3, "max_steps": 10, "eval_interval": 5, "save_interval": 5}


def batch(seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 101, (2, 21), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def model_with_adapters(dtype: torch.dtype = torch.float64) -> GPT2:
    model = tiny_model().to(dtype)
    add_adapters(model, 4, 8.0, seed=3)
    for number, parameter in enumerate(lora_parameters(model).values()):
        torch.manual_seed(number)
        parameter.data = torch.randn_like(parameter, dtype=dtype) * 0.1
    return model


def test_new_adapters_do_not_change_the_loss() -> None:
    plain, model = tiny_model(), tiny_model()
    add_adapters(model, 4, 8.0, seed=3)
    assert torch.equal(plain(*batch()), model(*batch()))


@pytest.mark.parametrize("mode", ["none", "full"])
def test_gradients_are_those_of_merged_weights(mode: str) -> None:
    model = model_with_adapters()
    model.activation_checkpointing = mode
    model.train()
    model(*batch()).backward()
    # Reference: the same function, with the adapters merged by autograd.
    reference = tiny_model().to(torch.float64).train()
    values: dict[str, torch.Tensor] = dict(reference.named_parameters())
    trained = {name: p.detach().clone().requires_grad_() for name, p in lora_parameters(model).items()}
    for name in values:
        layer = name.removesuffix(".weight")
        if f"{layer}.lora.a" in trained:
            values[name] = values[name].detach() + 2.0 * trained[f"{layer}.lora.b"] @ trained[f"{layer}.lora.a"]
    torch.func.functional_call(reference, values, batch()).backward()
    for name, parameter in model.named_parameters():
        if name in trained:
            torch.testing.assert_close(parameter.grad, trained[name].grad)
        else:
            assert parameter.grad is None, name
    assert len(trained) == 2 * 4 * 3


def test_frozen_bfloat16_weights_give_the_gradients_of_float32() -> None:
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model_with_adapters(torch.float32)
        model.wte.weight.data = model.wte.weight.data.bfloat16().float()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ".lora." not in name:
                parameter.data = parameter.data.bfloat16().to(dtype)
        model.train()
        model(*batch()).backward()
        grads.append([parameter.grad for parameter in lora_parameters(model).values()])
    for float32, bfloat16 in zip(*grads, strict=True):
        torch.testing.assert_close(bfloat16, float32)


def test_decoder_and_merged_weights_compute_what_training_does() -> None:
    model = model_with_adapters(torch.float32).eval()
    ids = batch()[0]
    hidden = model.hidden_states(ids)
    cache = KVCache(model, 2, ids.size(1))
    with torch.no_grad():
        torch.testing.assert_close(Decoder(model)(ids, cache), model.logits(hidden[:, -1]))
    merged = tiny_model()
    for name, parameter in merged.named_parameters():
        parameter.data = merge_adapter(model, name, base_parameters(model)[name])
    torch.testing.assert_close(merged.eval().hidden_states(ids), hidden)


def train(name: str, **changes: object) -> None:
    run_job(None, {key: str(value) for key, value in {**TINY, "name": name, **changes}.items()}, StopRequest())


@pytest.fixture
def base_weights(volumes: Path) -> Path:
    """Save weights to start from as volumes/models/first."""
    train("before", max_steps=10)
    folder = volumes / "models" / "first"
    folder.parent.mkdir(exist_ok=True)
    shutil.copytree(volumes / "runs/before/checkpoints" / retention.checkpoint_name(10), folder)
    return folder


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_bit_identical_and_only_adapted_weights_change(
    volumes: Path, base_weights: Path, weights_dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**LORA, "weights_dtype": weights_dtype, "dropout": 0.1, "learning_rate": 0.01}
    train("straight", **settings, sample_tokens=10)
    assert "adapters of rank 3" in capsys.readouterr().err
    train("halved", **{**settings, "max_steps": 5}, decay_steps=10, warmup_steps=0)
    train("halved", **settings, decay_steps=10, warmup_steps=0)
    train("whole", **settings, decay_steps=10, warmup_steps=0)
    ends = [volumes / "runs" / name / "checkpoints" / retention.checkpoint_name(10) for name in ("halved", "whole")]
    for file in ("adapters.safetensors", "optimizer.safetensors", "model.safetensors"):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes(), file
    before, after = (load_file(folder / "model.safetensors") for folder in (base_weights, ends[1]))
    rounded = {
        name: t.bfloat16().float() if weights_dtype == "bfloat16" and t.dim() > 1 else t for name, t in before.items()
    }
    changed = {name for name in before if not torch.equal(rounded[name], after[name])}
    assert changed == {
        name for name in before if ".h." in name and name.endswith(("attn.weight", "proj.weight", "fc.weight"))
    }
    losses = [json.loads(line) for line in (volumes / "runs/whole/metrics.jsonl").read_text().splitlines()]
    val_losses = [row["val_loss"] for row in losses if row["kind"] == "eval"]
    assert val_losses[-1] < val_losses[0]


def test_a_checkpoint_loads_as_plain_gpt2(
    volumes: Path, base_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("tuned", **LORA, learning_rate=0.01)
    folder = (volumes / "runs/tuned/checkpoints/best").resolve()
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    loaded = GPT2.empty(load_shape(folder), 0.0, "cpu")
    load_weights(folder, loaded)
    with torch.no_grad():
        logits = loaded.eval().logits(loaded.hidden_states(ids))
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    train("tuned", **LORA, learning_rate=0.01, eval_only=True)
    state = json.loads((folder / "state.json").read_text())
    printed = float(capsys.readouterr().out.split()[1])
    assert printed == pytest.approx(state["best_val_loss"], abs=1e-4)


def test_adapters_on_other_base_weights_are_refused(volumes: Path, base_weights: Path) -> None:
    train("tuned", **{**LORA, "max_steps": 5})
    tensors = load_file(base_weights / "model.safetensors")
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"] + 1e-3
    save_file(tensors, base_weights / "model.safetensors", metadata={"format": "pt"})
    (base_weights / "state.json").unlink()  # otherwise its checksums refuse the changed file first
    with pytest.raises(BadInput, match=r"other weights than these: ln_f\.bias differs"):
        train("tuned", **LORA)
    with pytest.raises(BadInput, match="lora_rank: 3 before, 2 now"):
        train("tuned", **{**LORA, "lora_rank": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 4}, "init_from scratch"),
        ({**LORA, "optimizer_states": "int8"}, "optimizer_states: found with lora_rank"),
        ({**LORA, "activation_checkpointing": "selective"}, "none or full with lora_rank"),
        ({**LORA, "lora_rank": 5000}, "at most n_embd"),
        ({"lora_alpha": 3}, "expected none without lora_rank"),
    ],
)
def test_settings_that_contradict_lora_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        train("x", **settings)
