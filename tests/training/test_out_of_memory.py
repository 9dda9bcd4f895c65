"""Memory runs out during training: the step is done again in a way that takes less, with the same result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2box.errors import MachineCannot
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.operator_faults import Refuse
from tests.helpers.settings import TINY


def train(name: str, refuse: Refuse | None = None, **changes: object) -> None:
    settings = {
        **TINY,
        "name": name,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "max_steps": 6,
        "eval_interval": 3,
        "micro_batch_size": "auto",
        **changes,
    }
    flags = {key: str(value) for key, value in settings.items()}
    if refuse is None:
        return run_job(None, flags, StopRequest())
    with refuse:
        run_job(None, flags, StopRequest())
    assert refuse.refused == refuse.times


def weights(volumes: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(volumes / "runs" / name / "checkpoints" / "last" / "model.safetensors")


# In forward, loss, backward, the optimizer's step (before it changes anything), and evaluation.
@pytest.mark.parametrize(
    ("operator", "nth"),
    [
        ("addmm", 30),
        ("native_layer_norm", 20),
        ("exp_", 9),
        ("gelu_backward", 5),
        ("mm", 9),
        ("stack", 4),
        ("addmm", 2),
    ],
)
def test_the_step_is_done_again_with_the_same_result(
    volumes: Path, operator: str, nth: int, capsys: pytest.CaptureFixture[str]
) -> None:
    train("plain")
    refuse = Refuse(operator, nth)
    train("refused", refuse)
    said = capsys.readouterr().err
    assert "out of memory in step" in said or operator in ("addmm", "exp_")  # those two meet an evaluation
    for key, tensor in weights(volumes, "plain").items():
        torch.testing.assert_close(weights(volumes, "refused")[key], tensor, rtol=1e-4, atol=2e-5)
    rows = [
        [json.loads(line) for line in (volumes / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "refused")
    ]
    assert [(row["kind"], row["step"]) for row in rows[0]] == [(row["kind"], row["step"]) for row in rows[1]]


def test_it_goes_down_as_far_as_there_is_a_way_then_saves_and_says_so(
    volumes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("run", max_steps=2, eval_interval=100)
    with pytest.raises(MachineCannot, match="no way is left"):
        train("run", Refuse("gelu_backward", 20, times=10_000), max_steps=30, eval_interval=100)
    said = capsys.readouterr().err
    assert said.count("out of memory in step") >= 2 and "activation_checkpointing full" in said
    step = json.loads((volumes / "runs" / "run" / "checkpoints" / "last" / "state.json").read_text())["step"]
    assert step >= 2
    train("run", max_steps=30, eval_interval=100)  # memory is there again: it goes on from there
    train("straight", max_steps=30, eval_interval=100)
    for key, tensor in weights(volumes, "straight").items():
        torch.testing.assert_close(weights(volumes, "run")[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("in_backward", "nth"), [(False, 30), (True, 50), (False, 90), (True, 170)])  # in steps 2, 5
def test_a_step_that_broke_off_half_way_is_taken_back(
    volumes: Path, in_backward: bool, nth: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lean = {"optimizer_states": "int8", "optimizer_in_backward": in_backward, "bias": False, "max_steps": 8}
    train("plain", **lean)
    train("refused", Refuse("bucketize", nth), **lean)
    said = capsys.readouterr().err
    assert "out of memory in step" in said and "some weights had taken that step already: going on from" in said
    for key, tensor in weights(volumes, "plain").items():
        # The averages' form of accumulation knows the micro-steps' number.
        assert in_backward or torch.allclose(weights(volumes, "refused")[key], tensor, rtol=0.05, atol=2e-3)
    rows = [json.loads(line) for line in (volumes / "runs/refused/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 3, 6, 8]


def test_half_a_step_with_muon_is_taken_back(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("plain", optimizer="muon")
    train("refused", Refuse("baddbmm", 130), optimizer="muon")  # of 80 a step
    assert "some weights had taken that step already: going on from" in capsys.readouterr().err
    for key, tensor in weights(volumes, "plain").items():
        torch.testing.assert_close(weights(volumes, "refused")[key], tensor, rtol=1e-3, atol=1e-4)


def test_when_memory_returns_so_does_the_way_before(
    volumes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2box.training.oom_fallback.RETRY_STEPS", 3)
    train("plain", max_steps=12)
    train("refused", Refuse("gelu_backward", 5), max_steps=12)
    said = capsys.readouterr().err
    assert "memory is free again: from step 5 with micro_batch_size 4, activation_checkpointing none" in said
    for key, tensor in weights(volumes, "plain").items():
        torch.testing.assert_close(weights(volumes, "refused")[key], tensor, rtol=1e-4, atol=2e-5)


def test_an_evaluation_without_memory_loses_no_step(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MachineCannot, match="out of memory"):
        train(
            "run", Refuse("exp_", 20, times=100), micro_batch_size=1, eval_interval=2, eval_windows=1, save_interval=50
        )
    step = json.loads((volumes / "runs" / "run" / "checkpoints" / "last" / "state.json").read_text())["step"]
    assert step == 2
