"""Decoding: the text is transformers', packed weights stay close, texts written together are those written alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2box.model.decoder import Decoder, KVCache
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.sampling import SamplingParams, generate, generate_batch, pad_prompts, sample_token
from tests.helpers.models import saved, tiny_model

PROMPTS = torch.randint(0, 101, (4, 5), generator=torch.Generator().manual_seed(3)).tolist()
UNEVEN = [PROMPTS[0], PROMPTS[1][:2], PROMPTS[2] + PROMPTS[3], [7]]


def plain_logits(model: GPT2, row: list[int]) -> torch.Tensor:
    return model.logits(model.hidden_states(torch.tensor([row]))[0, -1])


def alone(model: GPT2, row: list[int], length: int, choice: SamplingParams, seed: int) -> list[int]:
    return list(generate(Decoder(model), row, length, choice, seed))


def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    ours = tiny_model()
    reference = GPT2LMHeadModel.from_pretrained(saved(ours, tmp_path)).eval()
    for row in PROMPTS:
        expected = reference.generate(torch.tensor([row]), max_new_tokens=19, do_sample=False, eos_token_id=-1)
        assert (
            row + list(generate(Decoder(ours), row, 19, SamplingParams(temperature=0), seed=0)) == expected[0].tolist()
        )


def test_text_goes_on_beyond_the_context() -> None:
    model = tiny_model()
    out = list(generate(Decoder(model), [1, 2, 3], 100, SamplingParams(temperature=0), seed=0))
    assert len(out) == 100
    window = [1, 2, 3]
    for token in out:
        if len(window) > 24:  # full: the newer half begins anew
            window = window[-12:]
        assert int(model.logits(model.hidden_states(torch.tensor([window]))[0, -1]).argmax()) == token
        window.append(token)


def test_choosing_a_token() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])

    def drawn(choice: SamplingParams) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        return {sample_token(logits, choice, generator) for _ in range(300)}

    assert drawn(SamplingParams(temperature=0)) == {3}
    assert drawn(SamplingParams(1.0, top_k=0, top_p=1.0)) == {0, 1, 2, 3}
    assert drawn(SamplingParams(1.0, top_k=2, top_p=1.0)) == {2, 3}
    assert drawn(SamplingParams(1.0, top_k=0, top_p=0.7)) == {2, 3}  # 0.64 alone is not enough
    assert drawn(SamplingParams(1.0, top_k=0, top_p=0.6)) == {3}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights, error", [(None, 1e-5), ("float32", 1e-5), ("float16", 5e-3), ("int8", 0.1)])
@torch.inference_mode()
def test_each_step_has_the_logits_of_the_plain_network(bias: bool, weights: str | None, error: float) -> None:
    model = tiny_model(bias)
    decoder = Decoder(copy.deepcopy(model), weights)
    cache = KVCache(model, len(UNEVEN), 24)
    rows = [list(row) for row in UNEVEN]
    new = pad_prompts(cache, rows, torch.device("cpu"))
    for step in range(8):
        logits = decoder(new, cache)
        wanted = torch.stack([plain_logits(model, row) for row in rows])
        assert (logits - wanted).abs().max() < error * wanted.std(), step
        for row in rows:
            row.append((row[-1] * 7 + step) % 101)
        new = torch.tensor([[row[-1]] for row in rows])


def test_texts_written_together_are_those_written_alone() -> None:
    model = tiny_model(dtype=torch.float64)  # in which no rounding decides
    choice = SamplingParams(1.0, 50, 0.95)
    steps = list(generate_batch(Decoder(model), UNEVEN, 60, choice, [5, 6, 7, 8]))  # far beyond the context of 24
    for row, prompt in enumerate(UNEVEN):
        assert [step[row] for step in steps] == alone(model, prompt, 60, choice, 5 + row)


def test_a_text_that_ends_leaves_the_others_going() -> None:
    model = tiny_model(dtype=torch.float64)
    texts = [alone(model, row, 30, SamplingParams(), seed=1) for row in UNEVEN]
    stop = texts[0][4]
    steps = list(generate_batch(Decoder(model), UNEVEN, 30, SamplingParams(), [1] * 4, stop_at=stop))
    for row, text in enumerate(texts):
        wanted = text[: text.index(stop)] if stop in text else text
        assert [step[row] for step in steps if step[row] is not None] == wanted


def test_a_model_in_training_decodes_without_dropout_and_goes_on_training() -> None:
    model = tiny_model(dropout=0.5).train()
    assert alone(model, [1, 2], 9, SamplingParams(), 0) == alone(model, [1, 2], 9, SamplingParams(), 0)
    assert model.training
