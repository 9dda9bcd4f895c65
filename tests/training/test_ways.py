"""Sessions that changed the execution plan or rolled back: manifest.json records it, and `verify` repeats it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2box.checkpoint.metadata import parse_state
from gpt2box.data import dataloader
from gpt2box.model.gpt2 import GPT2
from gpt2box.runs import metrics
from gpt2box.runs.listing import find_run
from gpt2box.runs.sessions import execution_changes_after, session_at_step, valid_sessions
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from gpt2box.verify.reproduce import reproduce
from gpt2box.verify.verify import verify
from tests.helpers.operator_faults import Refuse
from tests.helpers.poisoned_data import poison_data
from tests.helpers.settings import TINY

RUN = {"micro_batch_size": "auto", "max_steps": 12, "eval_interval": 4, "save_interval": 4, "log_interval": 1}
LONG = {"max_steps": 32, "eval_interval": 16, "save_interval": 8, "log_interval": 4}
STEADY = {"lr_schedule": "constant", "warmup_steps": 0}


def train(**changes: object) -> None:
    values = {**TINY, **RUN, "name": "run", "dropout": 0.1, **changes}
    run_job(None, {key: str(value) for key, value in values.items()}, StopRequest())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss of steps 18 to 23 NaN through their data."""
    for where, name in ((dataloader.TrainWindows, "start"), (dataloader, "read_windows"), (GPT2, "forward")):
        monkeypatch.setattr(where, name, getattr(where, name))  # so that monkeypatch restores them
    poison_data(18, 23)


def manifest(volumes: Path) -> dict[str, Any]:
    return dict(json.loads((volumes / "runs/run/manifest.json").read_text()))


def ways(volumes: Path, session: int = -1) -> list[tuple[int, int, str]]:
    """Return a session's recorded plans as (first step, micro-batch size, activation checkpointing)."""
    found = manifest(volumes)["sessions"][session].get("ways", [])
    return [(way["step"], way["micro_batch_size"], way["activation_checkpointing"]) for way in found]


def without_ways(volumes: Path) -> None:
    """Remove the recorded plans from the manifest, like a run of an older version."""
    content = manifest(volumes)
    for session in content["sessions"]:
        session.pop("ways")
    (volumes / "runs/run/manifest.json").write_text(json.dumps(content))


def test_steps_after_memory_ran_out_are_done_again_as_they_were(
    volumes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpt2box.training.oom_fallback.RETRY_STEPS", 3)
    with Refuse("gelu_backward", 5):  # in step 2
        train()
    assert ways(volumes) == [(1, 2, "none"), (4, 4, "none")]
    assert manifest(volumes)["sessions"][0]["way"]["micro_batch_size"] == 4
    verdict = verify(find_run("run"), None, None)
    assert verdict.same and verdict.compared == list(range(1, 13)) and verdict.environment == []
    said = capsys.readouterr().err
    assert "after step 1 with micro_batch_size 2, activation_checkpointing none, as then" in said
    assert "after step 4 with micro_batch_size 4" in said
    assert verify(find_run("run"), "4", 8).same
    without_ways(volumes)
    assert verify(find_run("run"), None, None).first_different_step == 2


def test_a_run_that_goes_on_after_memory_ran_out_says_in_what_it_differs_and_is_verified_across(
    volumes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Refuse("gelu_backward", 5):
        train(max_steps=8, **STEADY)
    train(max_steps=12, **STEADY)
    assert "way.micro_batch_size: 2 before, 4 now: from here on the run is not bit-identical" in capsys.readouterr().err
    content = manifest(volumes)
    content["sessions"][1]["changed"] = {}  # pretend that the first session was only stopped
    (volumes / "runs/run/manifest.json").write_text(json.dumps(content))
    assert execution_changes_after(valid_sessions(content), 0).keys() == {1, 8}
    verdict = verify(find_run("run"), None, None)
    assert verdict.same and verdict.end == 12


@pytest.mark.parametrize("in_backward", [False, True])
def test_steps_that_a_half_done_one_took_back_are_done_again_in_the_way_of_the_last_time(
    volumes: Path, in_backward: bool
) -> None:
    lean = {"optimizer_states": "int8", "optimizer_in_backward": in_backward, "bias": False}
    with Refuse("bucketize", 230 if in_backward else 130) as refuse:
        train(**lean)
    assert refuse.refused
    ((step, _, _),) = ways(volumes)
    assert step == 4  # the checkpoint it rolled back to; the repeated steps used the fallback plan, too
    verdict = verify(find_run("run"), None, None)
    assert verdict.same and verdict.end == 12


def test_data_that_were_passed_over_are_so_again(volumes: Path, poison: None) -> None:
    train(**LONG)
    state = parse_state(volumes / "runs/run/checkpoints/last")[0]
    assert [back.step for back in state.rollbacks] == [16]
    for start in (None, "8", "16", "24"):
        verdict = verify(find_run("run"), start, 32)
        assert verdict.same and verdict.end == 32


def test_a_session_that_went_back_behind_its_own_beginning_did_the_steps_from_there(
    volumes: Path, poison: None
) -> None:
    train(**LONG | {"max_steps": 20, "micro_batch_size": 4}, **STEADY)
    train(**LONG | {"micro_batch_size": 2}, **STEADY)
    assert manifest(volumes)["sessions"][1]["step"] == 20
    assert ways(volumes) == [(16, 2, "none")]
    for start in (None, "8", "16"):
        verdict = verify(find_run("run"), start, 32)
        assert verdict.same and verdict.environment == []


def test_going_back_in_the_way_of_before_ends_what_was_noted_of_later_steps(volumes: Path) -> None:
    def session(step: int, micro: int, *later: tuple[int, int]) -> dict[str, Any]:
        noted = [{"step": first, "micro_batch_size": size} for first, size in later]
        return {"step": step, "way": {"micro_batch_size": micro, "compile": False}, "ways": noted, "changed": {}}

    sessions = [session(0, 8, (12, 4), (14, 8), (10, 8)), session(20, 8, (25, 2)), session(22, 8)]
    held = [session_at_step(sessions, step)["way"]["micro_batch_size"] for step in range(30)]
    assert held == [8] * 30 and execution_changes_after(sessions, 0) == {}
    sessions.append(session(24, 8, (26, 1)))
    assert execution_changes_after(sessions, 0) == {26: {"micro_batch_size": 1, "compile": False}}
    assert session_at_step(sessions, 23)["step"] == 22 and session_at_step(sessions, 21)["step"] == 20


class RefuseBoth(Refuse):
    """Fail an allocation, and every later write of the manifest."""

    def __init__(self, run: Path) -> None:
        super().__init__("gelu_backward", 5)
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except torch.cuda.OutOfMemoryError:
            (self.run / ".manifest.json.tmp").mkdir()  # blocks the temporary file of the new manifest
            raise


def test_a_disk_that_refuses_the_note_does_not_end_the_run(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RefuseBoth(volumes / "runs/run"):
        train()
    said = capsys.readouterr().err
    assert "note: manifest.json does not say that steps are done with micro_batch_size 2" in said
    assert "finished at step 12" in said and ways(volumes) == []


def test_reproduce_says_that_the_run_went_on_in_another_way(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Refuse("gelu_backward", 5):
        train()
    capsys.readouterr()
    reproduce(volumes / "runs/run/manifest.json", "again", None, StopRequest())
    said = capsys.readouterr().err
    assert "note: the run went on from step 1 with micro_batch_size 2, grad_accum_steps 4" in said
    rows = [metrics.read_rows(volumes / "runs" / name / "metrics.jsonl") for name in ("run", "again")]
    first, again = ({row["step"]: row["digest"] for row in each if row["kind"] == "train"} for each in rows)
    assert first[1] == again[1] and first[2] != again[2]


@pytest.mark.parametrize("damage", [7, [7], [{"step": "x"}], [{"step": 3, "micro_batch_size": 4}], None, "missing"])
def test_a_damaged_note_is_no_traceback(volumes: Path, damage: object) -> None:
    train()
    content = manifest(volumes)
    content["sessions"][0]["ways"] = damage
    if damage == "missing":
        del content["sessions"][0]["ways"]
    (volumes / "runs/run/manifest.json").write_text(json.dumps(content))
    assert verify(find_run("run"), None, None).same
