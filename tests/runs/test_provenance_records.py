"""Records that make a run repeatable: fingerprints, sessions, settings; and no secrets in them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2box.checkpoint.fingerprint import fingerprint_files, fingerprint_run_state
from gpt2box.checkpoint.metadata import load_verified_state
from gpt2box.errors import BadInput
from gpt2box.runs.manifest import describe_weights
from gpt2box.runs.sessions import session_differences
from gpt2box.system.provenance import collect_provenance
from tests.helpers.commands import Command
from tests.helpers.models import tiny_model
from tests.helpers.repeatable_runs import REPEATABLE_RUN, train
from tests.helpers.settings import options


def test_the_fingerprint_changes_with_any_bit_of_weights_or_optimizer_state() -> None:
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


SETUPTOOLS = """
from gpt2box.system.provenance import package_versions
before = package_versions()
import setuptools
assert package_versions() == before
"""


def test_importing_setuptools_does_not_change_the_recorded_packages() -> None:
    done = subprocess.run([sys.executable, "-c", SETUPTOOLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_resumes_with_a_changed_setting_only_if_allow_change_names_it(volumes: Path) -> None:
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


def test_resume_warns_about_another_number_of_threads(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train()
    path = volumes / "runs/run/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sessions"][-1]["cpu"]["threads"] = 7
    path.write_text(json.dumps(manifest))
    train(max_steps=25)
    assert "cpu.threads: 7 before, 1 now: from here on the run is not bit-identical" in capsys.readouterr().err


def test_the_manifest_records_everything_that_determines_a_run(volumes: Path) -> None:
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


def test_session_differences_are_named() -> None:
    now = collect_provenance(torch.device("cpu"))
    assert session_differences(now, now) == []
    before = {**now, "python": "3.9", "environment": {"MKL_CBWR": "COMPATIBLE"}, "gpu": {"name": "x"}}
    now = {**now, "environment": {}}
    assert session_differences(before, now) == [
        "environment.MKL_CBWR: COMPATIBLE before, nothing now",
        f"python: 3.9 before, {now['python']} now",
    ]
    assert session_differences(before, now, bits_only=True) == ["environment.MKL_CBWR: COMPATIBLE before, nothing now"]


SECRET = "hf_thisIsNoRealTokenButLooksLikeOne"


def test_the_hub_token_appears_in_no_file_and_no_output(volumes: Path, gpt2box: Command) -> None:
    environment = {"HF_TOKEN": SECRET, "HUGGING_FACE_HUB_TOKEN": SECRET}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        settings = {**REPEATABLE_RUN, "max_steps": 5, "name": "run", "sample_tokens": 4, "log_format": "json"}
        done = [
            gpt2box("train", *options(**settings)),
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


def test_checkpoints_without_a_fingerprint_can_be_read(volumes: Path) -> None:
    train()
    folder = volumes / "runs/run/checkpoints/step-00000020"
    content = json.loads((folder / "state.json").read_text())
    del content["digest"]
    (folder / "state.json").write_text(json.dumps(content))
    assert load_verified_state(folder).step == 20
