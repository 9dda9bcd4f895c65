"""A run's folder as a bad disk, a careless copy or an enemy may leave it: said in a few lines, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2box.checkpoint import retention
from gpt2box.checkpoint.fingerprint import fingerprint_files
from gpt2box.checkpoint.metadata import REQUIRED_FILES, Rollback, TrainState, parse_state, write_state
from gpt2box.checkpoint.safetensors_io import read_tensors
from gpt2box.data.downloads import sha256_of
from gpt2box.errors import Damaged
from gpt2box.runs import metrics
from tests.helpers.commands import STEERING, command
from tests.helpers.settings import TINY, options

RUN = {**TINY, "name": "run", "max_steps": 20, "save_interval": 5}
MORE = {**RUN, "max_steps": 30}
SAMPLE = ["sample", "run", "--max-new-tokens", "1"]


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes with a run of twenty steps and four checkpoints."""
    volumes = tmp_path_factory.mktemp("hostile") / "volumes"
    shutil.copytree(prepared, volumes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2BOX_VOLUMES", str(volumes))
        assert command("train", *options(**RUN))[0] == 0
    return volumes


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that run's folder, to spoil. What waits for ever is ended."""
    shutil.copytree(trained, tmp_path / "volumes", symlinks=True)
    monkeypatch.setenv("GPT2BOX_VOLUMES", str(tmp_path / "volumes"))
    signal.alarm(100)
    yield tmp_path / "volumes" / "runs" / "run"
    signal.alarm(0)


def train(**settings: Any) -> tuple[object, str]:
    return command("train", *options(**settings))


def newest(run: Path) -> Path:
    return run / "checkpoints" / retention.checkpoint_name(20)


def steps_in(run: Path) -> list[int]:
    return [row["step"] for row in metrics.read_rows(run / "metrics.jsonl")]


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FILES = ["plan.json", "config.yaml", "manifest.json", "metrics.jsonl", "log.txt", ".lock", "loss.png"]
STORED = ["state.json", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("name", [*FILES, *(f"checkpoints/step-00000020/{name}" for name in STORED)])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(run: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for words in (
        ["runs"],
        ["monitor", "run", "--once"],
        ["report", "run"],
        ["sample", "run", "--max-new-tokens", "1"],
    ):
        code, said = command(*words)
        assert code in (0, 2, 4) and "Traceback" not in said, (words, code, said)
    code, said = train(**MORE)
    assert code in (0, 2) and "Traceback" not in said, (code, said)


def test_a_file_in_place_of_the_events_folder_is_said(run: Path) -> None:
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("")
    code, said = train(**MORE)
    assert code == 78 and "tensorboard" in said and "Traceback" not in said, said


def test_a_pipe_in_place_of_a_checkpoint_is_passed_over_and_goes(run: Path) -> None:
    shutil.rmtree(newest(run))
    os.mkfifo(newest(run))
    code, said = train(**RUN)
    assert code == 0 and "passed over a damaged checkpoint" in said and newest(run).is_dir(), said


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    """state.json of a checkpoint of step 20."""
    folder = tmp_path / retention.checkpoint_name(20)
    folder.mkdir()
    files = {name: {"bytes": 1, "sha256": "0" * 64} for name in sorted(REQUIRED_FILES)}
    state = TrainState(20, 18, 20, 2.5, 2.5, 10, recent_losses=[1.0], rollbacks=[Rollback(5, 3)])
    write_state(folder, state, files)
    assert parse_state(folder) == (state, files)
    return folder / "state.json"


FILE = {"bytes": 1, "sha256": "0" * 64}
VALUES: dict[str, list[Any]] = {
    "step": ["20", 1.5, None, [1], -1, True, 10**400, 10**12, 19],
    "seconds": [float("nan"), float("inf"), -1, "s", None],
    "optimizer_steps": ["x", 21, -1, 10**30],
    "bad_steps": [21, 2**52, -1],
    "evaluated_step": [21],
    "best_step": [21],
    "best_val_loss": ["x", []],
    "recent_losses": [[float("nan")], 3, [1e300], [-1e300], [-2.0]],
    "rollbacks": [
        *([1], [{"step": 1}], [{"step": 1, "left_out": -3}], {}),
        *([{"step": 1, "left_out": 2**52}], [{"step": 100, "left_out": 3}]),
    ],
    "format": ["4", 0, None, 1.5, True],
    "digest": ["0" * 64, 3],
    "files": [
        *({}, [], None, {"config.json": FILE}),
        *(
            dict.fromkeys((*sorted(REQUIRED_FILES), odd), FILE)
            for odd in ("/dev/zero", "../x", "a\0", "a\n", STEERING, "")
        ),
        {name: {"bytes": -1, "sha256": "0" * 64} for name in sorted(REQUIRED_FILES)},
        {name: {"bytes": 1, "sha256": "x"} for name in sorted(REQUIRED_FILES)},
    ],
}
WRONG: list[dict[str, Any]] = [{key: value} for key, values in VALUES.items() for value in values]


@pytest.mark.parametrize("change", WRONG, ids=lambda change: str(change)[:60])
def test_a_state_that_no_run_could_have_is_damaged(state_file: Path, change: dict[str, Any]) -> None:
    files = change.get("files")
    if isinstance(files, dict) and files:
        change = {**change, "digest": fingerprint_files(files)}
    edited(state_file, **change)
    with pytest.raises(Damaged) as raised:
        parse_state(state_file.parent)
    assert "\x1b" not in str(raised.value) and len(str(raised.value)) < 2000


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", "{}", '"x"', '{"format": 4}', '{"format": 4, "step": '])
def test_what_is_no_state_is_damaged(state_file: Path, text: str) -> None:
    state_file.write_text(text)
    with pytest.raises(Damaged):
        parse_state(state_file.parent)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: list[object] = [
    {"a": entry(dtype="I32")},
    {"a": entry(dtype="F99")},
    {"a": entry(shape=(3,))},
    {"a": entry(shape=(-2,))},
    {"a": entry(shape="2")},
    {"a": entry(offsets=(4, 12))},
    {"a": entry(offsets=(8, 0))},
    {"a": entry(offsets=(0, 10**30))},
    {"a": entry(offsets=(-8, 0))},
    {"a": {"dtype": "F32"}},
    {"a": 5},
    {"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(1,), offsets=(0, 4))},
    {"a": entry(shape=(1,), offsets=(0, 4))},
    [],
    "x",
    {},
]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_tensors_that_lie_otherwise_than_said_are_damaged(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(Damaged):
        list(read_tensors(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, (1 << 40).to_bytes(8, "little"), b"\2\0\0\0\0\0\0\0\xff\xff", b"\1\0\0"]
)
def test_what_has_no_header_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(Damaged):
        list(read_tensors(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("lost", ["all", "one"])
def test_averages_that_lack_are_not_taken_for_zero(run: Path, lost: str) -> None:
    from safetensors.torch import load_file, save_file

    path = newest(run) / "optimizer.safetensors"
    averages = {} if lost == "all" else dict(sorted(load_file(path).items())[1:])
    save_file(averages, path)
    files = json.loads((newest(run) / "state.json").read_text())["files"]
    files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    edited(newest(run) / "state.json", files=files, digest=fingerprint_files(files))
    code, said = train(**MORE)
    assert code == 4 and "optimizer.safetensors: without exp_avg" in said, said


@pytest.mark.parametrize("how", ["away", "empty", "dangling", "loop", "a file"])
def test_checkpoints_that_are_gone_are_missed_and_the_record_stays(run: Path, how: str) -> None:
    edited(run / "plan.json", save_interval=5)
    shutil.move(run / "checkpoints", run.parent.parent / "elsewhere")
    if how == "empty":
        (run / "checkpoints").mkdir()
    elif how == "a file":
        (run / "checkpoints").write_text("")
    elif how != "away":
        (run / "checkpoints").symlink_to("checkpoints" if how == "loop" else "/not/mounted")
    before = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "config.yaml", "manifest.json")}
    code, said = train(**{**MORE, "n_layer": 1})
    words = "its checkpoints are gone" if how in ("away", "empty") else f"cannot read {run / 'checkpoints'}"
    assert code == (4 if how in ("away", "empty") else 78) and words in said, said
    assert {name: (run / name).read_bytes() for name in before} == before
    shutil.rmtree(run / "checkpoints") if how == "empty" else (run / "checkpoints").unlink(missing_ok=True)
    shutil.move(run.parent.parent / "elsewhere", run / "checkpoints")
    code, said = train(**MORE)
    assert code == 0 and "at step 20" in said and steps_in(run)[-1] == 30, said


@pytest.mark.parametrize(
    ("interval", "gone"),
    [
        (10, []),
        (500, []),
        (5, ["plan.json", "log.txt", "manifest.json"]),
        (5, ["config.yaml", "log.txt"]),
        (5, ["plan.json", "metrics.jsonl"]),
    ],
)
def test_a_run_that_had_a_checkpoint_does_not_begin_anew(run: Path, interval: int, gone: list[str]) -> None:
    """A run whose checkpoints were deleted is refused, even a short one and whichever other files are missing."""
    edited(run / "plan.json", save_interval=interval)
    for name in gone:
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    code, said = train(**MORE)
    assert code == 4 and "its checkpoints are gone" in said, said


def test_a_run_that_went_on_does_not_begin_anew(run: Path) -> None:
    assert train(**{**MORE, "save_interval": 500})[0] == 0
    for name in ("metrics.jsonl", "log.txt"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    code, said = train(**MORE)
    assert code == 4 and "was trained to step 20, and its checkpoints are gone" in said, said


def test_a_run_that_may_have_been_killed_in_its_first_save_begins_anew(run: Path) -> None:
    edited(run / "plan.json", save_interval=500)
    (run / "log.txt").unlink()
    shutil.rmtree(run / "checkpoints")
    code, said = train(**RUN)
    assert code == 0 and steps_in(run)[-1] == 20 and "gone" not in said, said


def test_a_checkpoint_of_another_run_is_not_gone_on_from(run: Path) -> None:
    assert train(**{**RUN, "name": "other", "seed": 7})[0] == 0
    shutil.rmtree(newest(run))
    shutil.copytree(newest(run.parent / "other"), newest(run))
    code, said = train(**MORE)
    assert code == 4 and "other weights than metrics.jsonl has noted for step 20" in said, said
    shutil.rmtree(newest(run))
    code, said = train(**MORE)
    assert code == 0 and "at step 15" in said and steps_in(run)[-1] == 30, said


def rewritten(folder: Path, name: str, content: dict[str, Any]) -> None:
    """A file of a checkpoint, with its checksum."""
    (folder / name).write_text(json.dumps(content))
    files = json.loads((folder / "state.json").read_text())["files"]
    files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    edited(folder / "state.json", files=files)


@pytest.mark.parametrize(
    "change", [{"n_head": 4}, {"activation_function": "gelu"}, {"gpt2box": {"bias": False}}], ids=str
)
@pytest.mark.parametrize("gone", ["nothing", "plan.json"])
def test_a_checkpoint_of_another_network_is_not_gone_on_from(run: Path, change: dict[str, Any], gone: str) -> None:
    (run / gone).unlink(missing_ok=True)
    rewritten(newest(run), "config.json", json.loads((newest(run) / "config.json").read_text()) | change)
    code, said = train(**MORE)
    assert code == 4 and "config.json has" in said and "the run's network: " in said, said


def test_a_checkpoint_of_another_vocabulary_is_not_gone_on_from(run: Path) -> None:
    content = json.loads((newest(run) / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    rewritten(newest(run), "tokenizer.json", content)
    code, said = train(**MORE)
    assert code == 4 and "another vocabulary than the dataset's" in said, said


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_settings_that_are_gone_are_those_of_the_manifest(run: Path, how: str) -> None:
    def spoil() -> None:
        (run / "config.yaml").unlink() if how == "gone" else (run / "config.yaml").write_text("")

    spoil()
    code, said = train(**{**MORE, "seed": 99})
    assert code == 2 and "seed: 1337 before, 99 now" in said, said
    edited(run / "manifest.json", settings=None)
    code, said = train(**MORE)
    assert code == 4 and str(run / "config.yaml") in said and str(run / "manifest.json") in said, said


def test_without_its_settings_a_run_goes_on_with_the_same(run: Path) -> None:
    (run / "config.yaml").unlink()
    code, said = train(**MORE)
    assert code == 0 and "using the settings in manifest.json" in said, said
    assert (run / "config.yaml").exists()


@pytest.mark.parametrize("content", ["{}", "x", "[]", '{"dataset": "x", "sessions": 5}', None])
def test_a_manifest_that_says_nothing_is_said_and_kept(run: Path, content: str | None) -> None:
    path = run / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    code, said = train(**MORE)
    assert code == 0 and f"note: {path} is {'missing' if content is None else 'damaged'}" in said, said
    assert "the dataset cannot be compared with the original" in (run / "log.txt").read_text()
    aside = run / "manifest.json.damaged"
    assert (aside.read_text() if aside.exists() else None) == content
    assert [session["step"] for session in json.loads(path.read_text())["sessions"]] == [20]


@pytest.mark.parametrize("sessions", [None, 5, "abc", {"a": 1}, [3, None]], ids=str)
def test_sessions_that_are_none_are_left_out(run: Path, sessions: object) -> None:
    edited(run / "manifest.json", sessions=sessions)
    code, said = train(**MORE)
    assert code == 0 and "Traceback" not in said, said
    assert [session["step"] for session in json.loads((run / "manifest.json").read_text())["sessions"]] == [20]


@pytest.mark.parametrize("dataset", [{"splits": {}}, "x", {"folder": 5}, [], {"folder": {}}], ids=str)
def test_what_a_run_is_evaluated_on_is_asked_for_where_nothing_says_it(run: Path, dataset: object) -> None:
    edited(run / "manifest.json", dataset=dataset)
    code, said = command("eval", "run")
    assert code == 2 and "--dataset NAME or --text FILE" in said, said


@pytest.mark.parametrize("gone", ["plan.json", "config.yaml"])
def test_a_change_whose_noting_was_cut_off_is_noted_by_the_next(run: Path, gone: str) -> None:
    """A folder in a file's place: it cannot be written, and what comes after it is not."""
    kept_file = (run / gone).read_bytes()
    (run / gone).unlink()
    changed = ["train", *options(**{**MORE, "learning_rate": 3e-4}), "--allow-change", "learning-rate"]
    if gone == "plan.json":
        (run / gone).mkdir()
    else:
        (run / gone).write_bytes(kept_file)
        (run / ".config.yaml.tmp").mkdir()
    assert command(*changed)[0] not in (0, None)
    (run / gone).rmdir() if gone == "plan.json" else (run / ".config.yaml.tmp").rmdir()
    (run / gone).write_bytes(kept_file)
    code, said = command(*changed)
    assert code == 0 and "resuming from" in said, said
    sessions = json.loads((run / "manifest.json").read_text())["sessions"]
    assert sessions[-1]["changed"] == {"learning_rate": 0.001, "max_steps": 20}
    for words in (["verify", "run"], ["verify", "run", "--from", "20"]):
        code, said = command(*words)
        assert code == 0 and "same bits" in said, said


def test_fewer_steps_than_a_run_has_done_are_said_to_be_past(run: Path) -> None:
    code, said = train(**{**RUN, "max_steps": 10})
    assert code == 0 and "which the run is past: it is at step 20, and nothing is left to do" in said, said
    assert "schedule now ends" not in said


def test_a_copy_of_a_checkpoint_is_none(run: Path) -> None:
    checkpoints = run / "checkpoints"
    for name in ("step-backup", "step-00000010x", "step-000000010", "step--1"):
        shutil.copytree(checkpoints / retention.checkpoint_name(10), checkpoints / name)
    for name in (retention.checkpoint_name(25), "step-99999999999"):
        shutil.copytree(checkpoints / retention.checkpoint_name(10), checkpoints / name)
    code, said = train(**{**MORE, "keep_last": 1})
    assert code == 0 and f"resuming from {checkpoints / retention.checkpoint_name(20)} at step 20" in said, said
    assert said.count("it is of step 10") == 2
    assert all((checkpoints / name).is_dir() for name in ("step-backup", "step-00000010x", "step-000000010", "step--1"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "state.json"])
def test_damaged_weights_are_not_used(run: Path, name: str) -> None:
    content = bytearray((newest(run) / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest(run) / name).write_bytes(content)
    for words in (["sample", "run", "--max-new-tokens", "1"], ["eval", "run"], ["export", "run"]):
        code, said = command(*words, "--checkpoint", "last")
        assert code == 4, (words, said)
    assert not (run / "export").exists()
    assert command("sample", "run", "--max-new-tokens", "1", "--checkpoint", "step-00000015")[0] == 0


@pytest.mark.parametrize("name", [".report.html.tmp", ".metrics.jsonl.tmp", ".config.yaml.tmp", "log.txt", "loss.png"])
def test_nothing_is_written_where_a_link_leads(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "victim").write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "victim")
    for _, said in (command("report", "run"), train(**MORE)):
        assert "Traceback" not in said, said
    assert (tmp_path / "victim").read_text() == "mine"


def test_no_file_of_a_run_steers_the_terminal(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["sessions"][0] |= {"environment": {"OMP_NUM_THREADS": STEERING}, "cpu": STEERING, "python": STEERING}
    (run / "manifest.json").write_text(json.dumps(manifest))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 20, "kind": "eval", "val_loss": 1.0, "val_set": STEERING}) + "\n")
    files = {**json.loads((newest(run) / "state.json").read_text())["files"], STEERING + "\nerror: x": FILE}
    edited(newest(run) / "state.json", files=files)
    shutil.copytree(run, run.parent / "other", symlinks=True)
    (run.parent / "other" / "config.yaml").write_text(f"seed: {json.dumps(STEERING)}\n{json.dumps(STEERING)}: 1\n")
    for words in (["train", *options(**MORE)], ["runs"], ["runs", "run", "other", "--compare"], ["verify", "run"]):
        _, said = command(*words)
        assert "\x1b" not in said and "\nerror: x" not in said, said


def test_folders_that_are_no_runs_hide_none(run: Path) -> None:
    for name in (b"\x1b[31mEVIL", b"bad\xff", b" ", b".hidden"):
        shutil.copytree(run, run.parent / os.fsdecode(name), symlinks=True)
    code, said = command("runs")
    assert code == 0 and said.count("\n") == 2 and "EVIL" not in said, said
    assert command("monitor", "--once")[0] == 0


@pytest.mark.parametrize("links", ["copied", "removed", "dangling"])
def test_a_run_goes_on_without_its_links(run: Path, links: str) -> None:
    for name in ("best", "last"):
        target = (run / "checkpoints" / name).resolve()
        (run / "checkpoints" / name).unlink()
        if links == "copied":  # cp -L and zip replace links by copies
            shutil.copytree(target, run / "checkpoints" / name)
        elif links == "dangling":
            (run / "checkpoints" / name).symlink_to("step-00000099")
    assert command("sample", "run", "--max-new-tokens", "1")[0] == 0
    code, said = train(**MORE)
    assert code == 0 and "at step 20" in said, said
    assert (run / "checkpoints" / "last").readlink() == Path(retention.checkpoint_name(30))


def test_a_folder_by_the_name_of_a_link_that_is_no_copy_stays(run: Path) -> None:
    (run / "checkpoints" / "last").unlink()
    (run / "checkpoints" / "last").mkdir()
    (run / "checkpoints" / "last" / "mine").write_text("")
    code, said = train(**MORE)
    assert code == 2 and "last is a folder" in said and (run / "checkpoints" / "last" / "mine").exists(), said


def test_of_a_checkpoint_that_was_moved_and_linked_the_link_alone_goes(run: Path, tmp_path: Path) -> None:
    place = run / "checkpoints" / retention.checkpoint_name(5)
    shutil.move(place, tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    (run / "checkpoints" / ".step-x.tmp").write_text("")
    (run / "checkpoints" / ".best.tmp").mkdir()
    code, said = train(**{**MORE, "keep_last": 1})
    assert code == 0 and not place.exists() and (tmp_path / "moved" / "state.json").exists(), said
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("file", ["val.bin", "train.bin"])
def test_tokens_that_are_not_what_was_written_are_not_trained_on(run: Path, file: str) -> None:
    path = run.parent.parent / "data" / "text" / file
    ids = np.fromfile(path, dtype="<u2")
    ids[7] ^= 1
    path.unlink()
    ids.tofile(path)
    for name in ("run", "another"):
        code, said = train(**{**MORE, "name": name})
        assert code == 4 and f"{file} does not hash to what dataset.json says" in said, said
    code, said = command("eval", "run", "--dataset", "text", "--split", file.removesuffix(".bin"))
    assert code == 4, said
    assert not (run.parent / "another" / "checkpoints").exists()


WRONG_LINES = [
    '{"step": Infinity, "kind": "train", "loss": 1.0}',
    '{"step": 1e400, "kind": "train", "loss": 1.0}',
    '{"step": ' + "9" * 400 + ', "kind": "eval", "val_loss": 1.0}',
    '{"step": 20, "kind": "train", "loss": ' + "9" * 400 + "}",
    '{"step": 20, "kind": "train", "loss": "x", "tokens_per_sec": [], "time": {}}',
    '{"step": 20, "kind": "train", "loss": 1.0, "tokens_per_sec": 1e-300, "time": null}',
    '{"step": 20, "kind": "eval", "val_loss": 1.0, "val_set": "\\ud800"}',
    '{"step": 20, "kind": [], "val_loss": 1.0}',
    "[" * 100_000,
    "3",
]


@pytest.mark.parametrize("line", WRONG_LINES, ids=lambda line: line[:50])
def test_a_line_of_metrics_that_no_run_writes_is_left_out(run: Path, line: str) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    shutil.copytree(run, run.parent / "other", symlinks=True)
    for words in (
        ["monitor", "--once"],
        ["runs"],
        ["runs", "run", "other", "--compare"],
        ["report"],
        ["verify", "run"],
    ):
        code, said = command(*words)
        assert code == 0 and "Traceback" not in said, (words, said)
    assert train(**MORE)[0] == 0


@pytest.mark.parametrize("value", ["x", [1], float("inf"), 10**400, None, {}])
@pytest.mark.parametrize("key", ["max_steps", "tokens_per_step", "epochs"])
def test_a_plan_that_no_run_has_is_read_past(run: Path, key: str, value: object) -> None:
    edited(run / "plan.json", **{key: value})
    for words in (["monitor", "--once"], ["runs"], ["report"]):
        code, said = command(*words)
        assert code == 0 and "Traceback" not in said, (words, said)
