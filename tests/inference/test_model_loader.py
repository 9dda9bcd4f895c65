"""Which model a name stands for, and what other programs make of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt2box.data.pretrained import load_shape
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import load_hf_weights
from tests.helpers.commands import Command


def test_transformers_loads_a_checkpoint_folder_with_the_same_logits(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "checkpoints" / "best"
    hf_model, hf_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "But soft, what light"
    x = hf_tokenizer(text, return_tensors="pt")["input_ids"]
    assert x.shape == (1, len(text)) and hf_tokenizer.decode(x[0]) == text
    model = GPT2(load_shape(folder))
    load_hf_weights(model, folder)
    with torch.no_grad():
        assert (hf_model(x).logits - model.logits(model.hidden_states(x))).abs().max() <= 1e-4
    text = hf_model.generate(x, max_new_tokens=5, do_sample=False)
    assert text.shape == (1, x.size(1) + 5)


def test_sample_without_a_run_suggests_commands_that_give_one(volumes: Path, gpt2box: Command) -> None:
    done = gpt2box("sample")
    assert done.returncode == 2 and "gpt2box train demo" in done.stderr
