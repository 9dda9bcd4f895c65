"""Verbatim overlap with the training text, and samples before and after training."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2box.evaluation import memorization
from tests.helpers.commands import Command
from tests.helpers.settings import TINYSHAKESPEARE, options

IDS = st.lists(st.integers(0, 3), max_size=40)


def brute_force_longest(texts: list[list[int]], train: list[int]) -> int:
    runs = [text[i:j] for text in texts for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
    return max((len(run) for run in runs if any(train[k : k + len(run)] == run for k in range(len(train)))), default=0)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(IDS, min_size=1, max_size=3), train=IDS.filter(bool), block=st.integers(1, 50))
def test_longest_overlap_matches_a_brute_force_search(texts: list[list[int]], train: list[int], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memorization, "BLOCK_TOKENS", block)
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            Path(file.name).write_bytes(np.array(train, "<u2").tobytes())
            found = memorization.longest_overlap([np.array(text, dtype=np.uint16) for text in texts], Path(file.name))
    assert len(found) == brute_force_longest(texts, train)
    assert not len(found) or brute_force_longest([found.tolist()], train) == len(found)


def test_an_overfitted_run_reports_that_it_recites_its_text(volumes: Path, tmp_path: Path, gpt2box: Command) -> None:
    text = tmp_path / "page.txt"
    text.write_text(TINYSHAKESPEARE.read_text()[:1200])
    gpt2box("prepare", str(text), "--tokenizer", "char", "--name", "page")
    # Evaluate only at start and end, so that the overfitted weights are the best.
    steps = {"max_steps": 300, "eval_interval": 300, "n_embd": 96, "learning_rate": 3e-3, "tokens_per_step": 1024}
    done = gpt2box("train", *options(dataset="page", name="page", sample_tokens=150, micro_batch_size=32, **steps))
    assert "it recites: give more text" in done.stderr, done.stderr
    found = json.loads((volumes / "runs" / "page" / "memorisation.json").read_text())
    assert found["overlap_tokens"] == len(found["overlap"]) >= 50
    assert (
        found["overlap"] in text.read_text()
        and found["overlap"] in (volumes / "runs/page/samples/best.txt").read_text()
    )
    again = gpt2box("train", *options(dataset="page", name="page", sample_tokens=150, micro_batch_size=32, **steps))
    assert "page: finished at step 300 before; nothing is left to do" in again.stderr, again.stderr


def test_fine_tuning_shows_samples_before_and_after_training(volumes: Path, gpt2box: Command) -> None:
    gpt2box("train", *options(name="base", max_steps=10))
    base = str(volumes / "runs" / "base" / "checkpoints" / "last")
    done = gpt2box("train", *options(name="tuned", init_from=base, n_layer=2, max_steps=10, sample_tokens=40))
    samples = (volumes / "runs" / "tuned" / "samples" / "before-after.txt").read_text()
    assert "before" in samples and "after 10 steps" in samples and samples.strip() in done.stderr
    assert "tokens in a row as in the training text" in done.stderr and "it recites" not in done.stderr
