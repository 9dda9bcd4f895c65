"""`gpt2box eval` on text: loss, perplexity and bits per byte, compared with transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2box.evaluation.perplexity import sliding_windows
from tests.helpers.commands import Command
from tests.helpers.settings import TINYSHAKESPEARE

Measure = Callable[..., dict[str, Any]]


def load_with_transformers(run: Path) -> tuple[Any, Any]:
    best = run / "checkpoints" / "best"
    return AutoModelForCausalLM.from_pretrained(best).eval(), AutoTokenizer.from_pretrained(best)


@pytest.mark.parametrize("count, size, stride", [(100, 32, 32), (100, 32, 7), (5, 32, 32), (32, 32, 1), (33, 32, 32)])
def test_sliding_windows_predict_each_token_once_with_as_much_context_as_fits(
    count: int, size: int, stride: int
) -> None:
    predicted = []
    for begin, end, first in sliding_windows(count, size, stride):
        predicted += list(range(first, end))
        assert end - begin == min(size, end) and begin <= first
    assert predicted == list(range(count))


@pytest.mark.parametrize("stride", [32, 10])
def test_loss_and_bits_per_byte_match_transformers_on_each_window(
    run: Path, measure: Measure, tmp_path: Path, stride: int
) -> None:
    text = TINYSHAKESPEARE.read_text()[-900:] + "naïve 漢字"
    (tmp_path / "text.txt").write_text(text)
    model, tokens = load_with_transformers(run)
    ids = torch.tensor([tokens.eos_token_id, *tokens(text)["input_ids"]])
    nats, done = 0.0, 0
    while done < len(ids) - 1:
        end = min(done + (stride if done else 32), len(ids) - 1)
        begin = max(0, end - 32)
        logits = model(ids[None, begin:end]).logits[0].detach().double().log_softmax(-1)
        nats -= sum(float(logits[i - begin, ids[i + 1]]) for i in range(done, end))
        done = end
    metrics = measure("--text", str(tmp_path / "text.txt"), "--stride", str(stride))
    assert metrics["tokens"] == len(ids) - 1 and metrics["bytes"] == len(text.encode())
    assert metrics["val_loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(nats / len(text.encode())), rel=1e-5)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(nats / len(text.split())), rel=1e-4)
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    again = measure("--text", str(tmp_path / "windows.txt"), "--stride", str(stride), "--max-tokens", "50")
    assert again["tokens"] == 50 and "word_perplexity" not in again
    assert (
        again["val_loss"]
        == measure("--text", str(tmp_path / "text.txt"), "--max-tokens", "50", "--stride", str(stride))["val_loss"]
    )


def test_eval_of_the_validation_split_matches_the_loss_that_training_logged(run: Path, measure: Measure) -> None:
    logged = [json.loads(line) for line in (run.parent / "whole" / "metrics.jsonl").open()]
    best = min(row["val_loss"] for row in logged if row["kind"] == "eval")
    metrics = measure("whole")  # training evaluates full windows only, here all of them
    assert metrics["val_loss"] == pytest.approx(best, abs=2e-4)
    assert metrics["on"].endswith("data/text") and metrics["stride"] == 32


def test_bad_options_of_eval_fail_with_an_error_message(
    run: Path, gpt2box: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2BOX_VOLUMES", str(run.parents[1]))
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    for arguments, part in [
        (["run", "--dataset", "text"], "text is in tokens of a char tokenizer of 65"),
        (["run", "--dataset", "none"], "no dataset in"),
        (["--task", "hellaswag", "--text", str(tmp_path / "latin.txt")], "--text with --task"),
        (["--file", str(tmp_path / "bad.jsonl")], "--file without --task"),
        (["run", "--task", "lambada", "--file", str(tmp_path / "bad.jsonl")], "bad.jsonl is not lambada"),
        (["run", "--task", "lambada", "--file", str(tmp_path / "broken.jsonl")], "broken.jsonl, line 1"),
        (["run", "--text", str(tmp_path / "latin.txt")], "latin.txt"),
        (["nothing"], "a run ("),
    ]:
        done = gpt2box("eval", *arguments)
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr
