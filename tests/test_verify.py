"""The same bits: whatever happens in between; and what is said where they are not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2box.checkpoint.fingerprint import fingerprint_files, fingerprint_run_state
from gpt2box.checkpoint.metadata import load_verified_state
from gpt2box.data.downloads import sha256_of
from gpt2box.errors import BadInput, Damaged, Gpt2boxError
from gpt2box.runs import metrics
from gpt2box.runs.listing import find_run
from gpt2box.runs.manifest import describe_weights
from gpt2box.runs.sessions import session_differences
from gpt2box.system.provenance import provenance
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from gpt2box.verify.reproduce import reproduce
from gpt2box.verify.verify import verify
from tests.helpers.commands import Command
from tests.helpers.models import tiny_model
from tests.helpers.settings import TINY, options

RUN = {"max_steps": 20, "save_interval": 5, "eval_interval": 10, "dropout": 0.1, "log_interval": 5}


def train(name: str = "run", allow: tuple[str, ...] = (), **changes: object) -> None:
    """In this process, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values = {key: str(value) for key, value in {**TINY, **RUN, "name": name, **changes}.items()}
        run_job(None, values, StopRequest(), allow)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def state(volumes: Path, name: str, step: int) -> dict[str, object]:
    content = json.loads((volumes / "runs" / name / f"checkpoints/step-{step:08d}/state.json").read_text())
    return dict(content)


def digests(volumes: Path, name: str) -> dict[int, str]:
    rows = metrics.read_rows(volumes / "runs" / name / "metrics.jsonl")
    return {row["step"]: row["digest"] for row in rows if row["kind"] == "train"}


def test_evaluating_and_sampling_more_often_or_stopping_between_does_not_change_a_bit(volumes: Path) -> None:
    train("plain")
    train("looked-at", eval_interval=5, sample_tokens=8, eval_windows=3)
    for steps in (5, 10, 20):  # three sessions
        train("stopped", max_steps=steps, decay_steps=20, warmup_steps=1)
    train("whole", decay_steps=20, warmup_steps=1)
    assert digests(volumes, "plain") == digests(volumes, "looked-at")
    assert digests(volumes, "stopped") == digests(volumes, "whole") != digests(volumes, "plain")
    for name, other in (("plain", "looked-at"), ("stopped", "whole")):
        assert state(volumes, name, 20)["digest"] == state(volumes, other, 20)["digest"]


def test_the_digest_is_another_where_one_bit_of_weights_or_averages_is() -> None:
    model = tiny_model(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.rand_like(parameter)}
    before = fingerprint_run_state(model, optimizer)
    assert re.fullmatch("[0-9a-f]{16}", before) and fingerprint_run_state(model, optimizer) == before
    for tensor in (model.ln_f.bias.data, optimizer.state[model.wpe.weight]["exp_avg"]):
        tensor.view(-1).view(torch.int32)[-1] ^= 1
        assert fingerprint_run_state(model, optimizer) != before
        tensor.view(-1).view(torch.int32)[-1] ^= 1
    assert fingerprint_run_state(model, optimizer) == before
    files = {"a.safetensors": {"sha256": "1"}, "b.json": {"sha256": "2"}}
    assert (
        fingerprint_files(files)
        == fingerprint_files({**files, "b.json": {"sha256": "3"}})
        != fingerprint_files({**files, "c.safetensors": files["b.json"]})
    )


def test_verify_does_steps_again_and_writes_nothing(volumes: Path, one_thread: object) -> None:
    train()
    before = {path: path.stat().st_mtime_ns for path in volumes.rglob("*")}
    verdict = verify(find_run("run"), None, None)
    assert verdict.same and verdict.compared == [5, 10, 15, 20] and verdict.environment == []
    verdict = verify(find_run("run"), "step-00000010", None)
    assert verdict.same and verdict.compared == [15]
    assert {path: path.stat().st_mtime_ns for path in volumes.rglob("*")} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"weights_dtype": "bfloat16", "optimizer_states": "int8", "optimizer_in_backward": True},
        {"init_from": "{}", "lora_rank": 4, "model": "gpt2"},
    ],
)
def test_verify_does_any_kind_of_step_again(volumes: Path, one_thread: object, changes: dict[str, object]) -> None:
    train("first", max_steps=5)
    weights = (volumes / "runs/first/checkpoints/last").resolve()
    train(max_steps=10, **{key: str(value).format(weights) for key, value in changes.items()})
    for start in (None, "5"):
        assert verify(find_run("run"), start, None).same


def test_verify_knows_the_settings_that_held_then(volumes: Path, one_thread: object) -> None:
    train()
    train(max_steps=40, log_interval=2)
    assert verify(find_run("run"), None, 40).end == 20  # where the schedule became another
    assert verify(find_run("run"), "20", 40).end == 40


def test_verify_names_the_first_step_and_tensor_that_differ(volumes: Path, gpt2box: Command) -> None:
    assert gpt2box("train", *options(**RUN, name="run")).returncode == 0
    folder = volumes / "runs/run/checkpoints/step-00000015"
    path = folder / "optimizer.safetensors"
    tensors = load_file(path)
    tensors["exp_avg.h.1.mlp.c_fc.bias"][3] += 1e-6
    save_file(tensors, path)
    content = json.loads((folder / "state.json").read_text())
    content["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    content["digest"] = fingerprint_files(content["files"])
    (folder / "state.json").write_text(json.dumps(content))
    done = gpt2box("verify", "run")
    assert done.returncode == 4, done.stderr
    assert "step 15 is the first that was found to differ" in done.stdout
    assert "up to step 10" in done.stdout
    assert "exp_avg.h.1.mlp.c_fc.bias, 1 of 128 numbers" in done.stdout
    assert "nothing that is recorded" in done.stdout


@pytest.mark.parametrize("words", [["--from", "5", "--steps", "2"], ["--from", "20"], ["--steps", "1"]], ids=str)
def test_verify_gives_a_command_that_can_be_done(volumes: Path, gpt2box: Command, words: list[str]) -> None:
    assert gpt2box("train", *options(**RUN, name="run")).returncode == 0
    refused = gpt2box("verify", "run", *words)
    assert refused.returncode == 2, refused.stdout
    hint = refused.stderr.partition("  next: gpt2box ")[2].split()
    assert hint[:2] == ["verify", "run"], refused.stderr
    assert gpt2box(*hint).returncode == 0


def test_where_threads_alone_differ_verify_says_how_to_have_as_many(volumes: Path, one_thread: object) -> None:
    train()
    rows = (volumes / "runs/run/metrics.jsonl").read_text()
    (volumes / "runs/run/metrics.jsonl").write_text(re.sub('"digest": "[0-9a-f]{4}', '"digest": "0000', rows))
    assert verify(find_run("run"), None, 5).next_step == ""
    path = volumes / "runs/run/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sessions"][0]["cpu"]["threads"] = 7
    path.write_text(json.dumps(manifest))
    verdict = verify(find_run("run"), None, 5)
    assert verdict.next_step == "OMP_NUM_THREADS=7 gpt2box verify run --steps 5"
    assert verdict.lines()[-1].endswith(verdict.next_step)


def test_verify_names_what_differs_between_then_and_now(volumes: Path, one_thread: object) -> None:
    train()
    torch.set_num_threads(2)
    verdict = verify(find_run("run"), None, 5)
    assert verdict.environment == ["cpu.threads: 1 before, 2 now"]


def test_verify_refuses_another_dataset_and_steps_of_which_nothing_is_kept(volumes: Path) -> None:
    train()
    with pytest.raises(BadInput, match="nothing is recorded of its steps 1 to 2"):
        verify(find_run("run"), None, 2)
    for wrong in ("7", "step-99", "../x", "best"):
        with pytest.raises(BadInput, match="no checkpoint"):
            verify(find_run("run"), wrong, None)
    path = volumes / "data/text/dataset.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match="the dataset in"):
        verify(find_run("run"), None, None)


def test_a_manifest_alone_gives_the_same_run(
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


SETUPTOOLS = """
from gpt2box.system.provenance import packages
before = packages()
import setuptools
assert packages() == before
"""


def test_what_a_compiled_run_imports_changes_no_packages() -> None:
    done = subprocess.run([sys.executable, "-c", SETUPTOOLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_program_sets_itself_is_no_difference_on_a_cpu(
    volumes: Path, gpt2box: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert gpt2box("train", *options(**{**RUN, "max_steps": 2}, name="run")).returncode == 0
    done = gpt2box("reproduce", str(volumes / "runs/run/manifest.json"))
    assert done.returncode == 0 and "note: " not in done.stderr, done.stderr


def test_what_a_manifest_needs_and_is_not_here_is_named(volumes: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("All the world's a stage, and all the men and women merely players. " * 100)
    from gpt2box.data.prepare_texts import Request, prepare_few
    from gpt2box.data.sources import own_text

    prepare_few(own_text([str(text)]), Request("char", 0.1), volumes / "data/mine")
    train("own", dataset="mine", max_steps=2)
    manifest = volumes / "runs/own/manifest.json"
    written = json.loads((volumes / "data/mine/dataset.json").read_text())
    (volumes / "data/mine").rename(volumes / "data/other")
    reproduce(manifest, "from-the-text", None, StopRequest())  # which lies where it lay
    assert json.loads((volumes / "data/mine/dataset.json").read_text()) == written
    (volumes / "data/mine").rename(volumes / "data/other2")
    text.rename(tmp_path / "away.txt")
    with pytest.raises(BadInput, match=r"mine\.txt, sha256 [0-9a-f]{64}"):
        reproduce(manifest, None, None, StopRequest())
    (volumes / "data/bpe").rename(volumes / "data/mine")
    with pytest.raises(BadInput, match=r"is not the run's:\n    train: .* then, .* now"):
        reproduce(manifest, None, None, StopRequest())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {}, "dataset": {"splits": {}}}', "[" * 9999, "\0"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(content)
    for wrong in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(Gpt2boxError, match="no manifest to reproduce a run from"):
            reproduce(wrong, None, None, StopRequest())


def test_a_change_that_is_sound_goes_on_when_asked_for_and_no_other(volumes: Path) -> None:
    train()
    with pytest.raises(BadInput, match="other settings") as raised:
        train(max_steps=25, learning_rate="5e-4")
    assert "to resume with the change: --allow-change learning-rate" in str(raised.value)
    train(max_steps=25, learning_rate="5e-4", allow=("learning-rate",))
    manifest = json.loads((volumes / "runs/run/manifest.json").read_text())
    assert manifest["sessions"][-1]["changed"] == {"learning_rate": 0.001, "max_steps": 20}
    assert manifest["settings"]["learning_rate"] == 5e-4
    for key, reason in (("n_layer", "must not"), ("eval_interval", "it may"), ("x", "no such setting")):
        with pytest.raises(BadInput, match=reason):
            train(allow=(key,))
    with pytest.raises(BadInput) as raised:
        train(max_steps=25, n_layer=3, learning_rate="5e-4", allow=("dropout",))
    assert "n_layer: 2 before, 3 now" in str(raised.value) and "--allow-change" not in str(raised.value)


def test_another_number_of_threads_is_said_on_resume(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train()
    path = volumes / "runs/run/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sessions"][-1]["cpu"]["threads"] = 7
    path.write_text(json.dumps(manifest))
    train(max_steps=25)
    assert "cpu.threads: 7 before, 1 now: from here on the run is not bit-identical" in capsys.readouterr().err


def test_the_manifest_holds_all_that_a_run_follows_from(volumes: Path) -> None:
    train()
    manifest = json.loads((volumes / "runs/run/manifest.json").read_text())
    assert manifest["settings"]["max_steps"] == 20 and manifest["plan"]["grad_accum_steps"] == 2
    assert manifest["seed"] == 1337 and manifest["weights"] == {"init_from": "scratch"}
    assert manifest["dataset"]["documents"][0]["sha256"] and manifest["dataset"]["splits"]["train"]["sha256"]
    (session,) = manifest["sessions"]
    assert session["cpu"]["model"] and session["cpu"]["threads"] and session["packages"]["torch"] == torch.__version__
    assert re.fullmatch("[0-9a-f]{64}", session["packages"]["all_sha256"])
    assert session["way"]["deterministic"] is True and session["locks"]["cpu"]
    folder = (volumes / "runs/run/checkpoints/last").resolve()
    assert list(describe_weights("x", folder)["sha256"]) == ["model.safetensors"]


def test_what_differs_between_two_sessions_is_named() -> None:
    now = provenance(torch.device("cpu"))
    assert session_differences(now, now) == []
    before = {**now, "python": "3.9", "environment": {"MKL_CBWR": "COMPATIBLE"}, "gpu": {"name": "x"}}
    now = {**now, "environment": {}}
    assert session_differences(before, now) == [
        "environment.MKL_CBWR: COMPATIBLE before, nothing now",
        f"python: 3.9 before, {now['python']} now",
    ]
    assert session_differences(before, now, bits_only=True) == ["environment.MKL_CBWR: COMPATIBLE before, nothing now"]


SECRET = "hf_thisIsNoRealTokenButLooksLikeOne"


def test_a_token_is_in_nothing_that_is_written_or_said(volumes: Path, gpt2box: Command) -> None:
    environment = {"HF_TOKEN": SECRET, "HUGGING_FACE_HUB_TOKEN": SECRET}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        done = [
            gpt2box(
                "train", *options(**{**RUN, "max_steps": 5, "name": "run", "sample_tokens": 4, "log_format": "json"})
            ),
            gpt2box("export", "run"),
            gpt2box("runs", "--json"),
            gpt2box("train", "demo", "--init-from", "no-one/nothing", "--name", "x", "--dataset", "bpe"),
        ]
    said = "".join(each.stdout + each.stderr for each in done)
    assert [each.returncode for each in done[:3]] == [0, 0, 0], said
    assert done[3].returncode in (2, 75), said
    assert SECRET not in said
    for place, _, names in os.walk(volumes):
        for name in names:
            assert SECRET.encode() not in (Path(place) / name).read_bytes(), name


def test_checkpoints_written_before_digests_were_are_read(volumes: Path) -> None:
    train()
    folder = volumes / "runs/run/checkpoints/step-00000020"
    content = json.loads((folder / "state.json").read_text())
    del content["digest"]
    (folder / "state.json").write_text(json.dumps(content))
    assert load_verified_state(folder).step == 20
