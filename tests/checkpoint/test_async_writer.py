"""Saves in a thread: without a staging buffer, and errors on close."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2box.checkpoint import async_writer
from gpt2box.checkpoint.async_writer import AsyncCheckpointWriter
from tests.helpers.training import train


def test_a_save_without_memory_for_a_copy_writes_the_same_files(
    volumes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train("copied")
    monkeypatch.setattr(async_writer, "SPARE_BYTES", 1 << 60)
    train("waiting")
    assert capsys.readouterr().err.count("checkpoints are written while training waits") == 1
    folders = [volumes / "runs" / name / "checkpoints/last" for name in ("copied", "waiting")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


def test_close_logs_the_error_of_a_save_in_place_of_raising_it() -> None:
    lines: list[str] = []
    writer = AsyncCheckpointWriter.__new__(AsyncCheckpointWriter)
    writer._thread, writer._error, writer._log = None, OSError(5, "Input/output error"), lines.append
    writer.close()
    assert lines == ["[Errno 5] Input/output error"]
