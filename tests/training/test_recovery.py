"""Numbers that are no longer finite, a device that fails, a checkpoint of another version: what a run does then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt2box.checkpoint import retention
from gpt2box.checkpoint.metadata import parse_state
from gpt2box.data import dataloader
from gpt2box.data.downloads import sha256_of
from gpt2box.errors import BadInput, Gpt2boxError
from gpt2box.model.gpt2 import GPT2
from gpt2box.runs import metrics
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.poisoned_data import poison_data
from tests.helpers.settings import TINY

LONG = {"max_steps": 40, "eval_interval": 20, "save_interval": 10, "log_interval": 7}


def train(name: str = "run", **changes: object) -> None:
    run_job(None, {key: str(value) for key, value in {**TINY, "name": name, **changes}.items()}, StopRequest())


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The data of steps 23 to 30 give a loss that is not a number."""
    for where, name in ((dataloader.TrainWindows, "start"), (dataloader, "read_windows"), (GPT2, "forward")):
        monkeypatch.setattr(where, name, getattr(where, name))  # which are put back afterwards
    poison_data(23, 30)
    yield


def checkpoints(volumes: Path, name: str = "run") -> Path:
    return volumes / "runs" / name / "checkpoints"


def end(volumes: Path, name: str = "run") -> list[str]:
    last = checkpoints(volumes, name) / "last"
    return [sha256_of(last / file) for file in ("model.safetensors", "optimizer.safetensors")]


def test_a_run_goes_back_and_passes_over_the_data_that_led_to_bad_steps(
    volumes: Path, poison: None, capsys: pytest.CaptureFixture[str]
) -> None:
    train(**LONG)
    said = capsys.readouterr().err
    assert "step 28: loss or gradient not finite, 5 steps in a row" in said
    assert "step-00000020, passing over the data of 8 steps" in said  # of 20 to 27: 23 was the first, 27 the fifth
    state = parse_state(checkpoints(volumes) / "last")[0]
    assert [(back.step, back.left_out) for back in state.rollbacks] == [(20, 8)] * 1 and state.step == 40
    rows = [row for row in metrics.read_rows(volumes / "runs/run/metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [7, 14, 21, 28, 35, 40]


def test_when_it_looks_does_not_change_what_it_goes_back_to(volumes: Path, poison: None) -> None:
    train("rare", **{**LONG, "log_interval": 40})
    train("often", **{**LONG, "log_interval": 1})
    train("timed", **LONG, save_minutes=1e-9)  # a checkpoint at each step, of which those by the clock do not count
    assert end(volumes, "rare") == end(volumes, "often") == end(volumes, "timed")


def test_what_was_passed_over_stays_so_when_the_run_goes_on(volumes: Path, poison: None) -> None:
    steady = {**LONG, "lr_schedule": "constant", "warmup_steps": 0}
    train("straight", **steady)
    train("halted", **{**steady, "max_steps": 26})  # in the middle of the bad steps
    assert parse_state(checkpoints(volumes, "halted") / "last")[0].bad_steps == 3
    train("halted", **{**steady, "max_steps": 34})
    train("halted", **steady)
    assert end(volumes, "halted") == end(volumes, "straight")


def test_a_run_that_no_other_data_help_stops_and_says_what_to_try(
    volumes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(max_steps=10, lr_schedule="constant", warmup_steps=0)
    before = end(volumes)
    plain = GPT2.forward
    monkeypatch.setattr(
        GPT2, "forward", lambda *inputs: plain(*inputs) * float("nan") if torch.is_grad_enabled() else plain(*inputs)
    )
    with pytest.raises(BadInput, match=r"5 steps in a row.*also after 3 returns") as raised:
        train(max_steps=60, lr_schedule="constant", warmup_steps=0, save_interval=10)
    assert "--learning-rate 0.0005" in str(raised.value)
    assert capsys.readouterr().err.count("passing over the data") == 3 and end(volumes) == before


def test_where_returns_to_a_checkpoint_do_not_help_a_run_goes_on_from_the_one_before(
    volumes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for where, name in ((dataloader.TrainWindows, "start"), (dataloader, "read_windows"), (GPT2, "forward")):
        monkeypatch.setattr(where, name, getattr(where, name))  # which are put back afterwards
    poison_data(23, 45)
    steady = {**LONG, "lr_schedule": "constant", "warmup_steps": 0, "keep_last": 1}
    train("straight", **steady)
    said = capsys.readouterr().err
    assert said.count("step-00000020, passing over") == 3
    assert "step-00000010, passing over the data of 33 steps; 3 returns to that of step 20 did not help" in said
    state = parse_state(checkpoints(volumes, "straight") / "last")[0]
    assert [(back.step, back.left_out, back.past) for back in state.rollbacks] == [(10, 33, 20)]  # 10 to 42
    assert state.step == 40 and (checkpoints(volumes, "straight") / "best").resolve().is_dir()
    for stop in (25, 31):  # in the midst of the first bad steps, and behind the last
        train("halted", **{**steady, "max_steps": stop})
    train("halted", **steady)
    assert end(volumes, "halted") == end(volumes, "straight")


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: the device is lost",
        "CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`: CUBLAS_STATUS_EXECUTION_FAILED",
    ],
)
def test_a_gpu_that_fails_is_named_and_the_run_can_be_started_again(
    volumes: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    train(max_steps=10)
    plain, calls = GPT2.forward, []

    def fails(*inputs: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError(words)
        return plain(*inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(GPT2, "forward", fails)
    with pytest.raises(Gpt2boxError) as raised:
        train(max_steps=20)
    assert raised.value.exit_code == 75 and words.splitlines()[0] in str(raised.value)
    assert "step-00000010" in str(raised.value)
    assert retention.find_newest_checkpoint(checkpoints(volumes))[1].step == 10  # type: ignore[index]
    monkeypatch.undo()


def test_any_other_error_stays_a_bug(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*inputs: object) -> torch.Tensor:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(GPT2, "forward", fails)
    with pytest.raises(RuntimeError, match="size of tensor"):
        train()


def test_memory_of_the_machine_that_runs_out_is_said(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*inputs: object) -> torch.Tensor:
        torch.empty(1 << 60, dtype=torch.uint8)
        raise AssertionError

    monkeypatch.setattr(GPT2, "forward", fails)
    with pytest.raises(Gpt2boxError, match="own memory ran out") as raised:
        train()
    assert raised.value.exit_code == 3


def test_a_network_for_which_the_machine_has_no_memory_is_said(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPT2, "init_weights", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(Gpt2boxError, match="own memory ran out while the network is made") as raised:
        train()
    assert raised.value.exit_code == 3 and not (volumes / "runs/run/config.yaml").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_run_folder_that_goes_away_is_not_made_anew(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = GPT2.forward, []

    def moves(*inputs: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 20:
            os.rename(volumes / "runs", volumes / "unplugged")
        return plain(*inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(GPT2, "forward", moves)
    with pytest.raises(Gpt2boxError) as raised:
        train(max_steps=20)
    assert raised.value.exit_code == 78 and not (volumes / "runs").exists()
