"""A trained run, and `gpt2box eval` on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2box.cli.model_commands import evaluate
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.settings import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """Train two short runs and return the folder of the first: `run` in GPT-2's tokens, `whole` in characters.

    Every evaluation of `whole` covers all full windows of the validation split.
    """
    volumes = tmp_path_factory.mktemp("evaluated") / "volumes"
    shutil.copytree(prepared, volumes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2BOX_VOLUMES", str(volumes))
        settings = {**TINY, "name": "run", "dataset": "bpe", "learning_rate": 1e-2}
        run_job(None, {key: str(value) for key, value in settings.items()}, StopRequest())
        settings = {**TINY, "name": "whole", "eval_windows": 0, "max_steps": 2, "eval_interval": 2}
        run_job(None, {key: str(value) for key, value in settings.items()}, StopRequest())
    return volumes / "runs" / "run"


@pytest.fixture
def measure(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Return a function that runs `gpt2box eval` on `run` (or on `whole`, if named) and returns its metrics."""
    monkeypatch.setenv("GPT2BOX_VOLUMES", str(run.parents[1]))

    def metrics(*arguments: str) -> dict[str, Any]:
        arguments = arguments if arguments[0] == "whole" else ("run", *arguments)
        capsys.readouterr()
        evaluate.main([*arguments, "--json"], standalone_mode=False)
        printed: dict[str, Any] = json.loads(capsys.readouterr().out)
        return printed

    return metrics
