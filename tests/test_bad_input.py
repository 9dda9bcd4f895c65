"""Whatever is given to a command: a few lines of message, its exit code, and nothing changed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2box.checkpoint.metadata import load_verified_state
from gpt2box.data.dataset import open_dataset
from gpt2box.data.dataset_folder import find_damaged_splits
from gpt2box.data.pretrained import load_shape
from gpt2box.errors import MAX_LINE_CHARS, BadInput, Gpt2boxError
from gpt2box.inference.model_loader import load_model
from gpt2box.runs.view import RunView
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from gpt2box.verify.reproduce import load_settings, read_complete_manifest
from gpt2box.verify.verify import with_session_plan
from gpt2box.verify.verify_range import find_step_range
from tests.helpers.commands import STEERING, command
from tests.helpers.settings import TINY

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
EXPECTED_CODES = (2, 3, 4, 75, 78)


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Volumes with a run of a few steps, $GPT2BOX_VOLUMES pointing to them."""
    volumes = tmp_path_factory.mktemp("bad") / "volumes"
    shutil.copytree(prepared, volumes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2BOX_VOLUMES", str(volumes))
        run_job(
            None, {key: str(value) for key, value in {**TINY, "name": "run", "max_steps": 10}.items()}, StopRequest()
        )
        yield volumes


def content(volumes: Path) -> dict[str, int]:
    """All files with the time of their last change; locks and a dataset's own log apart."""
    return {
        os.path.join(place, name): os.lstat(os.path.join(place, name)).st_mtime_ns
        for place, _, names in os.walk(volumes)
        for name in names
        if not name.endswith(".lock")
    }


READERS = {
    "train": ["train", "{}"],
    "plan": ["plan", "{}"],
    "fetch": ["fetch", "{}"],
    "preflight": ["preflight", "{}", "--device", "cpu"],
    "prepare": ["prepare", "{}", "--name", "new"],
    "verify of a dataset": ["prepare", "--verify", "{}"],
    "sample": ["sample", "{}", "--device", "cpu", "--max-new-tokens", "2"],
    "prompts": ["sample", "run", "--prompts", "{}", "--device", "cpu", "--max-new-tokens", "2"],
    "prompt": ["sample", "run", "--prompt-file", "{}", "--device", "cpu", "--max-new-tokens", "2"],
    "eval": ["eval", "{}", "--device", "cpu"],
    "text": ["eval", "run", "--text", "{}", "--device", "cpu"],
    "task": ["eval", "run", "--task", "lambada", "--file", "{}", "--device", "cpu"],
    "export": ["export", "{}"],
    "import": ["import", "{}"],
    "report": ["report", "{}"],
    "runs": ["runs", "{}"],
    "monitor": ["monitor", "{}", "--once"],
    "verify": ["verify", "{}"],
    "checkpoint": ["verify", "run", "--from", "{}"],
    "reproduce": ["reproduce", "{}"],
    "weights": ["train", "--dataset", "text", "--init-from", "{}", "--name", "new", "--device", "cpu"],
    "name": ["train", "demo", "--dataset", "text", "--name", "{}"],
    "change": ["train", "demo", "--allow-change", "{}"],
    "dataset": ["train", "demo", "--dataset", "{}"],
}


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_input_is_refused_in_a_few_lines_and_nothing_changes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)) * 9)
    (tmp_path / "loop").symlink_to("loop")
    wrong = [
        "./folder",
        "./folder.yaml",
        "./binary",
        "./loop",
        "../../../etc/passwd",
        STEERING,
        "x" * 5000,
        "./" + "x/" * 3000,
    ]
    before = content(trained)
    for each in wrong:
        code, said = command(*(word.format(each) for word in READERS[kind]))
        assert code in EXPECTED_CODES or (kind in ("fetch", "dataset") and "binary" in each), (each[:50], code, said)
        assert "Traceback" not in said and "\x1b" not in said, (each[:50], said)
        assert len(said.splitlines()) < 30 and max(map(len, said.splitlines())) < MAX_LINE_CHARS + 100, each[:50]
    assert content(trained) == before


def test_a_message_cannot_steer_the_terminal_and_ends() -> None:
    fault = BadInput(f"found {STEERING}\u202e\ud800", "x" * 10_000, "ü\tnext")
    text = str(fault)
    assert "\\x1b]0;title\\x07" in text and "\\u202e" in text and "\\ud800" in text and "ü" in text
    assert len(text) < 2000 and "(10,012 characters)" in text


def test_a_link_out_of_the_volumes_is_not_followed_by_a_name(trained: Path, tmp_path: Path) -> None:
    for name in ("../../etc", "/etc", "..", ".hidden", "a/b", "x" * 101, "ü"):
        code, said = command("train", "demo", "--dataset", "text", "--name", name)
        assert code == 2, said
    last = trained / "runs/run/checkpoints/last"
    whole = os.readlink(last)
    last.unlink()
    last.symlink_to(tmp_path)  # a checkpoint that is none
    try:
        assert command("sample", "run", "--checkpoint", "last", "--device", "cpu")[0] in EXPECTED_CODES
        assert not list(tmp_path.iterdir())
    finally:
        last.unlink()
        last.symlink_to(whole)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def changed(whole: object, path: list[int], value: object) -> object:
    """A JSON value with what stands at a place, found by going down by numbers, replaced."""
    if not path or not isinstance(whole, dict | list) or not whole:
        return value
    keys = list(whole) if isinstance(whole, dict) else list(range(len(whole)))
    key = keys[path[0] % len(keys)]
    copy = dict(whole) if isinstance(whole, dict) else list(whole)
    copy[key] = changed(whole[key], path[1:], value)  # type: ignore[index]
    return copy


@pytest.mark.parametrize("name", ["dataset.json", "state.json", "config.json", "manifest.json"])
@QUICK
@given(path=st.lists(st.integers(0, 99), min_size=1, max_size=5), value=JSON)
def test_any_value_anywhere_in_what_is_read_is_used_or_refused(
    trained: Path, tmp_path: Path, name: str, path: list[int], value: object
) -> None:
    run = trained / "runs/run"
    last = (run / "checkpoints/last").resolve()
    file = {"dataset.json": trained / "data/text", "manifest.json": run}.get(name, last) / name
    whole = file.read_bytes()
    file.write_text(json.dumps(changed(json.loads(whole), path, value)), encoding="utf-8")
    try:
        with contextlib.suppress(Gpt2boxError):
            if name == "dataset.json":
                find_damaged_splits(file.parent, open_dataset(file.parent).manifest)
            elif name == "state.json":
                load_verified_state(last)
            elif name == "config.json":
                if load_shape(last).parameters < 10**6:
                    load_model(last, "cpu")
            else:
                load_settings(read_complete_manifest(file), file, None, None)
        if name == "manifest.json":
            assert RunView(run).summary
            with contextlib.suppress(Gpt2boxError):
                stretch = find_step_range(run, None, 1000)
                for way in (stretch.session["way"], *stretch.ways.values()):
                    with_session_plan(stretch, way)
    finally:
        file.write_bytes(whole)
