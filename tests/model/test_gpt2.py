"""The network matches transformers' GPT-2 with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from gpt2box.model.gpt2 import GPT2
from gpt2box.model.shape import ModelShape
from tests.helpers.models import saved, tiny_model


def token_ids() -> torch.Tensor:
    return torch.randint(0, 101, (3, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_gradients_match_transformers(tmp_path: Path, bias: bool) -> None:
    ours = tiny_model(bias)
    reference = GPT2LMHeadModel.from_pretrained(saved(ours, tmp_path), attn_implementation="eager").eval()
    x = token_ids()
    logits = reference(x).logits
    assert (ours.logits(ours.hidden_states(x)) - logits).abs().max() <= 1e-4
    assert logits.std() > 0.3  # the logits differ enough for the comparison to mean something

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


def test_initial_weights_follow_the_seed_and_give_the_loss_of_guessing() -> None:
    model, again = (GPT2(ModelShape(4, 4, 64, 32, 1000)) for _ in range(2))
    model.init_weights(5)
    again.init_weights(5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert abs(model.h[0].mlp.c_proj.weight.std() - 0.02 / 8**0.5) < 5e-4
    assert abs(model.h[0].mlp.c_fc.weight.std() - 0.02) < 5e-4
    x = torch.randint(0, 1000, (8, 32))
    assert abs(model(x, x.roll(1, 1)) - torch.log(torch.tensor(1000.0))) < 0.1


def test_the_loss_under_autocast_stays_close_to_float32() -> None:
    model, x = tiny_model(), token_ids()
    exact = model(x, x.roll(-1, 1))
    exact.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, x.roll(-1, 1))
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.02 * exact
    for found, expected in zip((p.grad for p in model.parameters()), grads, strict=True):
        assert found.dtype == torch.float32 and (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_gives_the_same_gradients(mode: str, dropout: float, bias: bool) -> None:
    x, losses, grads = token_ids(), [], []
    for setting in ("none", mode):
        model = tiny_model(bias, dropout=dropout, dtype=torch.float64).train()
        model.activation_checkpointing = setting
        torch.manual_seed(7)
        loss = model(x, x.roll(-1, 1))
        loss.backward()
        losses.append(loss)
        grads.append([p.grad for p in model.parameters()])
    assert losses[0] == losses[1]
    for saved_grad, recomputed in zip(*grads, strict=True):
        assert (saved_grad - recomputed).abs().max() < 1e-15
