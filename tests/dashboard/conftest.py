"""An empty folder of runs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty volume's folder of runs."""
    monkeypatch.setenv("GPT2BOX_VOLUMES", str(tmp_path))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"
