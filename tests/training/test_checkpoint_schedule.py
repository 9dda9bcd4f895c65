"""When a run saves, without saving anything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt2box.checkpoint.metadata import TrainState
from gpt2box.training.checkpoint_schedule import CheckpointSchedule
from tests.helpers.optimizers import plan as make_plan


class Writer:
    """Counts saves in place of writing files."""

    def __init__(self) -> None:
        self.saved: list[int] = []

    def save(self, state: TrainState) -> None:
        self.saved.append(state.step)


def make_schedule(step: int, started_from_weights: bool = False, **settings: str) -> tuple[CheckpointSchedule, Writer]:
    """Make the schedule of a run that stands at `step`, with save_interval 100."""
    writer: Any = Writer()
    job: Any = SimpleNamespace(
        plan=make_plan(save_interval="100", **settings),
        state=TrainState(step=step),
        optimizer=torch.optim.SGD([torch.zeros(1)], 0.1),
        group=SimpleNamespace(is_single_process=True, is_rank_0=True),
        started_from_weights=started_from_weights,
    )
    steps: Any = SimpleNamespace(check_bad_steps=lambda: None)
    return CheckpointSchedule(job, writer, steps), writer


@pytest.mark.parametrize(("step", "is_due"), [(100, True), (150, False), (200, True)])
def test_a_save_is_due_at_every_save_interval(step: int, is_due: bool) -> None:
    schedule, _ = make_schedule(0)
    schedule.job.state.step = step
    assert schedule.is_due(improved=False, now=False) is is_due


def test_a_step_is_not_saved_twice() -> None:
    schedule, writer = make_schedule(0)
    schedule.job.state.step = 100
    schedule.save()
    assert writer.saved == [100] and not schedule.is_due(improved=False, now=True)


def test_a_resumed_run_does_not_save_its_own_checkpoint_again() -> None:
    schedule, _ = make_schedule(100)
    assert not schedule.is_due(improved=False, now=True)


def test_the_end_of_a_run_is_saved_at_any_step() -> None:
    schedule, _ = make_schedule(0)
    schedule.job.state.step = 7
    assert schedule.is_due(improved=False, now=True)


@pytest.mark.parametrize("started_from_weights", [False, True])
def test_the_first_evaluation_is_saved_only_if_the_weights_were_trained_before(started_from_weights: bool) -> None:
    schedule, _ = make_schedule(0, started_from_weights)
    assert schedule.is_due(improved=True, now=False) is started_from_weights


def test_a_run_without_save_minutes_is_never_overdue() -> None:
    schedule, _ = make_schedule(0, save_minutes="0")
    schedule.saved_at = 0.0
    assert not schedule.is_overdue()
    schedule, _ = make_schedule(0, save_minutes="1")
    assert not schedule.is_overdue()
    schedule.saved_at -= 61
    assert schedule.is_overdue()
