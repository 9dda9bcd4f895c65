"""Sampling: greedy text matches transformers, and a batch gives the texts of single prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from gpt2box.model.decoder import Decoder
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.sampling import SamplingParams, generate, generate_batch, sample_token
from tests.helpers.models import saved, tiny_model

PROMPTS = torch.randint(0, 101, (4, 5), generator=torch.Generator().manual_seed(3)).tolist()


UNEVEN_PROMPTS = [PROMPTS[0], PROMPTS[1][:2], PROMPTS[2] + PROMPTS[3], [7]]


def generate_single(model: GPT2, prompt: list[int], length: int, params: SamplingParams, seed: int) -> list[int]:
    return list(generate(Decoder(model), prompt, length, params, seed))


def test_greedy_text_matches_transformers(tmp_path: Path) -> None:
    ours = tiny_model()
    reference = GPT2LMHeadModel.from_pretrained(saved(ours, tmp_path)).eval()
    for row in PROMPTS:
        expected = reference.generate(torch.tensor([row]), max_new_tokens=19, do_sample=False, eos_token_id=-1)
        assert row + generate_single(ours, row, 19, SamplingParams(temperature=0), seed=0) == expected[0].tolist()


def test_text_longer_than_the_context_continues_from_its_newer_half() -> None:
    model = tiny_model()
    out = generate_single(model, [1, 2, 3], 100, SamplingParams(temperature=0), seed=0)
    assert len(out) == 100
    window = [1, 2, 3]
    for token in out:
        if len(window) > 24:  # the context is full: restart from its newer half
            window = window[-12:]
        assert int(model.logits(model.hidden_states(torch.tensor([window]))[0, -1]).argmax()) == token
        window.append(token)


def test_temperature_top_k_and_top_p_limit_the_sampled_tokens() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])

    def sampled(params: SamplingParams) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        return {sample_token(logits, params, generator) for _ in range(300)}

    assert sampled(SamplingParams(temperature=0)) == {3}
    assert sampled(SamplingParams(1.0, top_k=0, top_p=1.0)) == {0, 1, 2, 3}
    assert sampled(SamplingParams(1.0, top_k=2, top_p=1.0)) == {2, 3}
    assert sampled(SamplingParams(1.0, top_k=0, top_p=0.7)) == {2, 3}  # 0.64 alone is not enough
    assert sampled(SamplingParams(1.0, top_k=0, top_p=0.6)) == {3}


def test_a_batch_gives_the_texts_of_single_prompts() -> None:
    model = tiny_model(dtype=torch.float64)  # float64, so that rounding decides no token
    params = SamplingParams(1.0, 50, 0.95)
    steps = list(generate_batch(Decoder(model), UNEVEN_PROMPTS, 60, params, [5, 6, 7, 8]))  # beyond the context of 24
    for row, prompt in enumerate(UNEVEN_PROMPTS):
        assert [step[row] for step in steps] == generate_single(model, prompt, 60, params, 5 + row)


def test_the_other_texts_continue_after_one_reaches_the_stop_token() -> None:
    model = tiny_model(dtype=torch.float64)
    texts = [generate_single(model, row, 30, SamplingParams(), seed=1) for row in UNEVEN_PROMPTS]
    stop = texts[0][4]
    steps = list(generate_batch(Decoder(model), UNEVEN_PROMPTS, 30, SamplingParams(), [1] * 4, stop_at=stop))
    for row, text in enumerate(texts):
        expected = text[: text.index(stop)] if stop in text else text
        assert [step[row] for step in steps if step[row] is not None] == expected


def test_a_model_in_training_mode_samples_without_dropout_and_stays_in_training_mode() -> None:
    model = tiny_model(dropout=0.5).train()
    texts = [generate_single(model, [1, 2], 9, SamplingParams(), 0) for _ in range(2)]
    assert texts[0] == texts[1] and model.training
