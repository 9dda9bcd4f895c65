"""The network is GPT-2: transformers' implementation, with the same weights, is the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from gpt2box.data.pretrained import shape_in
from gpt2box.errors import BadInput, Damaged
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import hf_state_dict, load_hf_weights
from gpt2box.model.loss import chunked_cross_entropy
from gpt2box.model.shape import ModelShape
from tests.helpers.models import saved, tiny_model


def theirs(model: GPT2, folder: Path) -> GPT2LMHeadModel:
    """transformers' model, read from our checkpoint folder."""
    return GPT2LMHeadModel.from_pretrained(saved(model, folder), attn_implementation="eager").eval()


def ids(batch: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path, bias: bool) -> None:
    ours = tiny_model(bias)
    reference = theirs(ours, tmp_path)
    x = ids()
    logits = reference(x).logits
    assert (ours.logits(ours.hidden_states(x)) - logits).abs().max() <= 1e-4
    assert logits.std() > 0.3  # the comparison says something

    targets = torch.randint(0, 101, x.shape, generator=torch.Generator().manual_seed(4))
    targets[0, :5] = -1
    loss = ours(x, targets)
    reference_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert abs(loss - reference_loss) <= 1e-5
    loss.backward()
    reference_loss.backward()
    grads = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for name, parameter in ours.named_parameters():
        expected = grads[f"transformer.{name}"]
        found = parameter.grad[:101] if name == "wte.weight" else parameter.grad
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            found = found.t()
        assert (found - expected).abs().max() <= 1e-5, name
    assert (ours.wte.weight.grad[101:] == 0).all()


def test_the_named_sizes_have_the_published_parameter_counts() -> None:
    from gpt2box.config.schema import MODEL_SHAPES

    published = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    for name, sizes in MODEL_SHAPES.items():
        shape = ModelShape(**sizes, block_size=1024, vocab_size=50_257)
        assert shape.parameters == published[name]
        with torch.device("meta"):
            model = GPT2(shape)
        padding = (shape.padded_vocab_size - shape.vocab_size) * shape.n_embd
        assert sum(p.numel() for p in model.parameters()) == published[name] + padding


def test_initial_weights_are_the_seeds_and_the_loss_is_that_of_guessing() -> None:
    model, again = (GPT2(ModelShape(4, 4, 64, 32, 1000)) for _ in range(2))
    model.init_weights(5)
    again.init_weights(5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert abs(model.h[0].mlp.c_proj.weight.std() - 0.02 / 8**0.5) < 5e-4
    assert abs(model.h[0].mlp.c_fc.weight.std() - 0.02) < 5e-4
    x = torch.randint(0, 1000, (8, 32))
    assert abs(model(x, x.roll(1, 1)) - torch.log(torch.tensor(1000.0))) < 0.1


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_loss_in_chunks_is_the_plain_one_in_float64(chunk: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(45, 16, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(128, 16, dtype=torch.float64, generator=generator).requires_grad_()  # 101 and padding
    targets = torch.randint(0, 101, (45,), generator=generator)
    targets[::4] = -1
    ours = chunked_cross_entropy(hidden, weight, targets, 101, chunk, scale)
    grads = torch.autograd.grad(ours, [hidden, weight])
    plain = scale * F.cross_entropy(hidden @ weight[:101].t(), targets, ignore_index=-1)
    expected = torch.autograd.grad(plain, [hidden, weight])
    assert abs(ours - plain) < 1e-13
    for found, wanted in zip(grads, expected, strict=True):
        assert (found - wanted).abs().max() < 1e-15
    assert (grads[1][101:] == 0).all() and (grads[0][::4] == 0).all()


def test_the_loss_of_nothing_is_zero_and_of_huge_logits_finite() -> None:
    hidden, weight = torch.randn(8, 16).requires_grad_(), torch.randn(64, 16).requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, torch.full((8,), -1), 60, 4)
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()
    assert chunked_cross_entropy(hidden * 1e4, weight, torch.arange(8), 60, 4).isfinite()


def test_under_autocast_the_loss_stays_close() -> None:
    model, x = tiny_model(), ids()
    exact = model(x, x.roll(-1, 1))
    exact.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, x.roll(-1, 1))
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.02 * exact
    for found, wanted in zip((p.grad for p in model.parameters()), grads, strict=True):
        assert found.dtype == torch.float32 and (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["selective", "full"])
def test_recomputing_gives_the_same_gradients(way: str, dropout: float, bias: bool) -> None:
    x, losses, grads = ids(), [], []
    for setting in ("none", way):
        model = tiny_model(bias, dropout=dropout, dtype=torch.float64).train()
        model.activation_checkpointing = setting
        torch.manual_seed(7)
        loss = model(x, x.roll(-1, 1))
        loss.backward()
        losses.append(loss)
        grads.append([p.grad for p in model.parameters()])
    assert losses[0] == losses[1]
    for plain, recomputed in zip(*grads, strict=True):
        assert (plain - recomputed).abs().max() < 1e-15


@pytest.mark.parametrize("bias", [True, False])
def test_weights_come_back_exactly(tmp_path: Path, bias: bool) -> None:
    model = tiny_model(bias)
    folder = saved(model, tmp_path)
    assert shape_in(folder) == model.shape
    again = GPT2(shape_in(folder))
    load_hf_weights(again, folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_a_folder_that_transformers_wrote_gives_its_logits(tmp_path: Path, shard: str) -> None:
    reference = theirs(tiny_model(), tmp_path)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    model = GPT2(shape_in(tmp_path / "theirs"))
    load_hf_weights(model, tmp_path / "theirs")
    assert (model.logits(model.hidden_states(ids())) - reference(ids()).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_16_bits_are_taken_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    reference = theirs(tiny_model(), tmp_path).to(dtype)
    reference.save_pretrained(tmp_path / "theirs")
    model = GPT2(shape_in(tmp_path / "theirs"))
    load_hf_weights(model, tmp_path / "theirs")
    assert (model.logits(model.hidden_states(ids())) - reference.float()(ids()).logits).abs().max() <= 1e-4


def test_another_network_with_the_same_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    reference = theirs(tiny_model(), tmp_path)
    reference.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["scale_attn_by_inverse_layer_idx"] = True
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="scale_attn_by_inverse_layer_idx True"):
        shape_in(tmp_path / "theirs")
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
    ("key", "value", "said"),
    [
        ("n_layer", 2.5, "n_layer is 2.5"),
        ("n_layer", True, "n_layer is True"),
        ("n_positions", 0, "block_size is 0"),
        ("vocab_size", 10**30, "vocab_size is 10"),
        ("n_head", 3, "no multiple of n_head 3"),
        ("n_embd", None, "n_embd is None"),
    ],
)
def test_sizes_that_no_network_has_are_named(tmp_path: Path, key: str, value: object, said: str) -> None:
    path = saved(tiny_model(), tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(Damaged, match=said):
        shape_in(path.parent)


def test_a_shorter_context_takes_the_first_positions(tmp_path: Path) -> None:
    model = tiny_model()
    folder = saved(model, tmp_path)
    short = GPT2(ModelShape(3, 4, 32, 8, 101))
    load_hf_weights(short, folder)
    x = ids(length=8)
    assert torch.allclose(short.hidden_states(x), model.hidden_states(x))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
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
