"""Run `docker run gpt2box …` on the built images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.docker import ROOT, Run, docker

READ_ONLY = ("--read-only", "--network", "none", "--tmpfs", "/tmp:exec,mode=1777", "--cap-drop", "ALL")
TINY = "--n-layer 1 --n-head 2 --n-embd 32 --block-size 64 --micro-batch-size 4 --tokens-per-step 256 --eval-windows 4"


def test_labels_say_version_revision_and_lock() -> None:
    labels = json.loads(docker("image", "inspect", "gpt2box-test:cu121", "--format", "{{json .Config.Labels}}").stdout)
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    lock = subprocess.run(["sha256sum", ROOT / "requirements" / "cu121.lock"], capture_output=True, text=True).stdout
    assert labels["org.opencontainers.image.revision"] == git
    assert labels["gpt2box.lock.sha256"] == lock.split()[0]
    assert labels["org.opencontainers.image.version"] and labels["gpt2box.stack"] == "cu121"


def test_the_entrypoint_takes_help_a_command_or_a_program(box: Run) -> None:
    assert "Usage: gpt2box" in box().stdout
    assert box("--version").stdout.startswith("gpt2box, version")
    assert box("gpt2box", "--version").stdout.startswith("gpt2box, version")
    assert box("bash", "-c", "echo $0 $1", "a", "b").stdout == "a b\n"
    unknown = box("smaple")
    assert unknown.returncode == 2 and "No such command 'smaple'" in unknown.stderr
    smi = box("nvidia-smi")
    assert smi.returncode == 3 and "--gpus all" in smi.stderr


def test_missing_mount_is_exit_78_before_anything_is_written(box: Run) -> None:
    done = box("prepare", "shakespeare", mount=False)
    assert done.returncode == 78 and "nothing is mounted" in done.stderr and "-v" in done.stderr


def test_a_volume_of_another_user_is_exit_78_with_the_fix(box: Run) -> None:
    done = box("prepare", "shakespeare", options=("--user", "1000:1000"))
    assert done.returncode == 78
    assert "sudo chown -R 1000:1000 volumes" in done.stderr and "--user 4321:4321" in done.stderr


def test_a_read_only_volume_is_exit_78(box: Run, tmp_path: Path) -> None:
    done = box("prepare", "shakespeare", options=("-v", f"{tmp_path}/volumes:/volumes:ro"), mount=False)
    assert done.returncode == 78 and "read-only" in done.stderr


def test_any_user_trains_and_samples_read_only_without_network(box: Run) -> None:
    assert box("prepare", "shakespeare", "--tokenizer", "char", options=READ_ONLY).returncode == 0
    train = ("train", "demo", "--name", "run", "--max-steps", "20", "--warmup-steps", "0", *TINY.split())
    done = box(*train, options=READ_ONLY)
    assert done.returncode == 0 and "make sample" in done.stderr, done.stderr
    sample = box("sample", "--prompt", "KING", "--max-new-tokens", "20", options=READ_ONLY)
    assert sample.returncode == 0 and sample.stdout.startswith("KING")


def test_sample_without_a_run_is_exit_2(box: Run) -> None:
    done = box("sample")
    assert done.returncode == 2 and "no run with a checkpoint" in done.stderr


def test_the_image_has_what_torch_compile_needs(box: Run) -> None:
    """For any user, on a read-only root: compiler, headers, and a cache that can be written."""
    for image in ("gpt2box-test:cpu", "gpt2box-test:cu121"):
        done = box("python", "-m", "gpt2box.preflight.smoke_test", "cpu", "True", options=READ_ONLY, image=image)
        assert '"compile_error"' in done.stdout, done.stdout + done.stderr
    headers = "import sysconfig, pathlib; assert pathlib.Path(sysconfig.get_paths()['include'], 'Python.h').exists()"
    assert box("python", "-c", headers, image="gpt2box-test:cu121").returncode == 0


def test_the_cuda_image_holds_its_lock(box: Run) -> None:
    done = box("python", "-c", "import torch; print(torch.__version__, torch.version.cuda)", image="gpt2box-test:cu121")
    assert done.stdout.split()[-2:] == ["2.4.1+cu121", "12.1"]
    assert box("nvitop", "--version", image="gpt2box-test:cu121").stdout.startswith("nvitop")


def test_the_cuda_image_without_a_gpu_stops_before_any_work(box: Run, tmp_path: Path) -> None:
    for command in (["train", "shakespeare"], ["preflight"]):
        done = box(*command, image="gpt2box-test:cu121")
        assert done.returncode == 3 and "--gpus all" in done.stderr + done.stdout and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("volumes/runs/*"))


@pytest.mark.parametrize("init", [(), ("--init",)], ids=["first process", "under init"])
def test_docker_stop_saves_and_the_same_command_resumes(box: Run, tmp_path: Path, init: tuple[str, ...]) -> None:
    assert box("prepare", "tinyshakespeare", "--tokenizer", "char").returncode == 0
    train = ["train", "--dataset", "tinyshakespeare-char", "--name", "run", "--device", "cpu", *TINY.split()]
    started = docker(
        "run", "-d", "-v", f"{tmp_path}/volumes:/volumes", "--user", "4321:4321", *init, "gpt2box-test:cpu", *train
    )
    container = started.stdout.strip()
    try:
        metrics = tmp_path / "volumes" / "runs" / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and '"train"' in metrics.read_text())
        docker("stop", "--time", "60", container)
        assert docker("inspect", container, "--format", "{{.State.ExitCode}}").stdout.strip() == "0"
        assert "stopped by SIGTERM" in docker("logs", container).stderr
    finally:
        docker("rm", "-f", container)
    state = json.loads((tmp_path / "volumes/runs/run/checkpoints/last/state.json").read_text())
    done = box(*train, "--max-steps", str(state["step"] + 5))
    assert done.returncode == 0 and f"at step {state['step']:,}" in done.stderr


def wait_for(condition: object, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.2)


def test_docker_stop_ends_a_command_that_saves_nothing(box: Run) -> None:
    container = docker("run", "-d", "gpt2box-test:cpu", "monitor").stdout.strip()
    try:
        wait_for(lambda: "no run" in docker("logs", container).stdout)
        docker("stop", "--time", "30", container)
        assert docker("inspect", container, "--format", "{{.State.ExitCode}}").stdout.strip() == "143"
    finally:
        docker("rm", "-f", container)


def test_source_change_rebuilds_only_the_last_layers(tmp_path: Path) -> None:
    for name in ("Dockerfile", ".dockerignore"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("configs", "entrypoint", "gpt2box", "requirements", "tests/data_files"):
        shutil.copytree(ROOT / name, tmp_path / name)
    with open(tmp_path / "gpt2box" / "errors.py", "a") as file:
        file.write("# changed\n")
    arguments = os.environ["GPT2BOX_BUILD_ARGUMENTS"].split()
    built = docker("build", "--build-arg", "STACK=cpu", *arguments, "--tag", "gpt2box-test:changed", tmp_path)
    assert built.returncode == 0, built.stderr
    before, after = (
        json.loads(docker("image", "inspect", image, "--format", "{{json .RootFS.Layers}}").stdout)
        for image in ("gpt2box-test:cpu", "gpt2box-test:changed")
    )
    docker("rmi", "gpt2box-test:changed")
    same = next(i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new)
    assert len(after) - same <= 3  # the source, its bytecode, the working folder
