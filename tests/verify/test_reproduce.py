"""Bit-exact repetition of a whole run with `gpt2box reproduce`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt2box.errors import BadInput, Gpt2boxError
from gpt2box.utils.signals import StopRequest
from gpt2box.verify.reproduce import reproduce
from tests.helpers.commands import Command
from tests.helpers.repeatable_runs import REPEATABLE_RUN, digests, state, train
from tests.helpers.settings import options


def test_reproduce_repeats_a_run_bit_for_bit_from_its_manifest_alone(
    volumes: Path, one_thread: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("first", dataset="tinyshakespeare-char")
    alone = tmp_path / "manifest.json"
    alone.write_bytes((volumes / "runs/first/manifest.json").read_bytes())
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    (volumes / "data/raw").rename(elsewhere / "data/raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2BOX_VOLUMES", str(elsewhere))
        reproduce(alone, "again", None, StopRequest())
        assert state(elsewhere, "again", 20)["digest"] == state(volumes, "first", 20)["digest"]
        assert digests(elsewhere, "again") == digests(volumes, "first")
        capsys.readouterr()
        reproduce(alone, "again", None, StopRequest())
        assert "finished at step 20" in capsys.readouterr().err


def test_reproduce_on_a_cpu_ignores_variables_that_the_program_sets_itself(
    volumes: Path, gpt2box: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert gpt2box("train", *options(**{**REPEATABLE_RUN, "max_steps": 2}, name="run")).returncode == 0
    done = gpt2box("reproduce", str(volumes / "runs/run/manifest.json"))
    assert done.returncode == 0 and "note: " not in done.stderr, done.stderr


def test_reproduce_names_the_missing_or_different_dataset(volumes: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("All the world's a stage, and all the men and women merely players. " * 100)
    from gpt2box.data.prepare_config import PrepareConfig
    from gpt2box.data.prepare_texts import prepare_texts
    from gpt2box.data.sources import load_texts

    prepare_texts(load_texts([str(text)]), PrepareConfig("char", 0.1), volumes / "data/mine")
    train("own", dataset="mine", max_steps=2)
    manifest = volumes / "runs/own/manifest.json"
    written = json.loads((volumes / "data/mine/dataset.json").read_text())
    (volumes / "data/mine").rename(volumes / "data/other")
    reproduce(manifest, "from-the-text", None, StopRequest())  # the text is still in its place
    assert json.loads((volumes / "data/mine/dataset.json").read_text()) == written
    (volumes / "data/mine").rename(volumes / "data/other2")
    text.rename(tmp_path / "away.txt")
    with pytest.raises(BadInput, match=r"mine\.txt, sha256 [0-9a-f]{64}"):
        reproduce(manifest, None, None, StopRequest())
    (volumes / "data/bpe").rename(volumes / "data/mine")
    with pytest.raises(BadInput, match=r"is not the run's:\n    train: .* then, .* now"):
        reproduce(manifest, None, None, StopRequest())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {}, "dataset": {"splits": {}}}', "[" * 9999, "\0"])
def test_reproduce_refuses_a_file_that_is_not_a_manifest(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(content)
    for wrong in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(Gpt2boxError, match="no manifest to reproduce a run from"):
            reproduce(wrong, None, None, StopRequest())
