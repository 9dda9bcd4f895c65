"""loss.png."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.commands import Command
from tests.helpers.settings import options


def test_an_unknown_matplotlib_backend_does_not_end_a_run(started: Command, volumes: Path) -> None:
    command = ["train", *options(name="a", max_steps=1, eval_interval=1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "nonsense")
        done = started(*command)
    assert done.returncode == 0 and (volumes / "runs/a/loss.png").exists(), done.stderr
