"""A trained run to sample from."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.settings import TINY


@pytest.fixture
def run(volumes: Path) -> Path:
    """Train a short run and return its folder."""
    run_job(None, {key: str(value) for key, value in {**TINY, "name": "run"}.items()}, StopRequest())
    return volumes / "runs" / "run"
