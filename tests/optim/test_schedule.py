"""Learning rate schedules and the settings derived from max_steps."""

from __future__ import annotations

import pytest

from gpt2box.config import loader
from gpt2box.optim.schedule import learning_rate_at
from tests.helpers.optimizers import plan, planned


@pytest.mark.parametrize(
    ("schedule", "middle"), [("cosine", 5.5e-4), ("linear", 5.5e-4), ("constant", 1e-3), ("constant-linear", 1e-3)]
)
def test_the_learning_rate_warms_up_and_decays(schedule: str, middle: float) -> None:
    p = plan(learning_rate="1e-3", min_lr="1e-4", lr_schedule=schedule)
    assert learning_rate_at(0, p) == pytest.approx(1e-5)
    assert learning_rate_at(99, p) == pytest.approx(1e-3) == learning_rate_at(100, p)
    assert learning_rate_at(550, p) == pytest.approx(middle)
    assert learning_rate_at(1000, p) == pytest.approx(1e-3 if schedule == "constant" else 1e-4)
    assert learning_rate_at(5000, p) == learning_rate_at(1000, p)
    if schedule == "constant-linear":
        assert learning_rate_at(800, p) == pytest.approx(1e-3) and learning_rate_at(900, p) == pytest.approx(5.5e-4)


def test_unset_settings_are_derived() -> None:
    p = plan()
    assert p.derived.min_lr == pytest.approx(p.config.learning_rate / 10)
    assert p.derived.decay_steps == p.config.max_steps
    other = planned(loader.load_config(None, {"dataset": "x", "max_steps": "5000"})[0], p.shape, 1)
    assert other.derived.warmup_steps == 100 and other.derived.save_interval == other.config.eval_interval
    execution = other.execution
    assert execution.grad_accum_steps * execution.micro_batch_size == other.sequences_per_step == 64
    assert learning_rate_at(0, p.with_derived(warmup_steps=0)) == pytest.approx(p.config.learning_rate)
