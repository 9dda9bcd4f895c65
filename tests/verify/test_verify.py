"""Bit-exact repetition of steps with `gpt2box verify`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2box.checkpoint.fingerprint import fingerprint_files
from gpt2box.data.downloads import sha256_of
from gpt2box.errors import BadInput, Damaged
from gpt2box.runs.listing import find_run
from gpt2box.verify.verify import verify
from tests.helpers.commands import Command
from tests.helpers.repeatable_runs import REPEATABLE_RUN, digests, state, train
from tests.helpers.settings import options


def test_evaluations_samples_and_restarts_change_no_bit_of_training(volumes: Path) -> None:
    train("plain")
    train("looked-at", eval_interval=5, sample_tokens=8, eval_windows=3)
    for steps in (5, 10, 20):  # three sessions
        train("stopped", max_steps=steps, decay_steps=20, warmup_steps=1)
    train("whole", decay_steps=20, warmup_steps=1)
    assert digests(volumes, "plain") == digests(volumes, "looked-at")
    assert digests(volumes, "stopped") == digests(volumes, "whole") != digests(volumes, "plain")
    for name, other in (("plain", "looked-at"), ("stopped", "whole")):
        assert state(volumes, name, 20)["digest"] == state(volumes, other, 20)["digest"]


def test_verify_repeats_steps_and_writes_no_files(volumes: Path, one_thread: object) -> None:
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
def test_verify_repeats_the_steps_of_every_kind_of_optimizer_and_weights(
    volumes: Path, one_thread: object, changes: dict[str, object]
) -> None:
    train("first", max_steps=5)
    weights = (volumes / "runs/first/checkpoints/last").resolve()
    train(max_steps=10, **{key: str(value).format(weights) for key, value in changes.items()})
    for start in (None, "5"):
        assert verify(find_run("run"), start, None).same


def test_verify_uses_the_settings_of_the_session_that_made_the_steps(volumes: Path, one_thread: object) -> None:
    train()
    train(max_steps=40, log_interval=2)
    assert verify(find_run("run"), None, 40).end == 20  # here the learning-rate schedule changed
    assert verify(find_run("run"), "20", 40).end == 40


def test_verify_names_the_first_step_and_tensor_that_differ(volumes: Path, gpt2box: Command) -> None:
    assert gpt2box("train", *options(**REPEATABLE_RUN, name="run")).returncode == 0
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
def test_verify_suggests_a_command_that_works(volumes: Path, gpt2box: Command, words: list[str]) -> None:
    assert gpt2box("train", *options(**REPEATABLE_RUN, name="run")).returncode == 0
    refused = gpt2box("verify", "run", *words)
    assert refused.returncode == 2, refused.stdout
    hint = refused.stderr.partition("  next: gpt2box ")[2].split()
    assert hint[:2] == ["verify", "run"], refused.stderr
    assert gpt2box(*hint).returncode == 0


def test_verify_suggests_the_original_number_of_threads_if_only_that_differs(volumes: Path, one_thread: object) -> None:
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


def test_verify_names_the_differences_of_the_environment(volumes: Path, one_thread: object) -> None:
    train()
    torch.set_num_threads(2)
    verdict = verify(find_run("run"), None, 5)
    assert verdict.environment == ["cpu.threads: 1 before, 2 now"]


def test_verify_refuses_another_dataset_and_steps_without_records(volumes: Path) -> None:
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
