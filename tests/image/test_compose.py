"""Run the profiles of compose.yaml and the Makefile's tasks on the CPU with a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.docker import Project, docker


def state(project: Project, run: str) -> dict[str, object]:
    return json.loads(project.path("runs", run, "checkpoints", "last", "state.json").read_text())  # type: ignore[no-any-return]


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.2)


def test_shakespeare_profile_finishes_and_reports_it_when_started_again(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare")
    done = project.compose("--profile", "shakespeare", "up", "--no-color")
    assert done.returncode == 0 and "finished at step 30" in done.stderr + done.stdout, done.stderr
    assert state(project, "shakespeare")["step"] == 30
    assert project.path("runs", "shakespeare", "loss.png").stat().st_uid == project.owner
    manifest = json.loads(project.path("runs", "shakespeare", "manifest.json").read_text())
    assert manifest["sessions"][0]["image"].startswith("cpu ")
    again = project.compose("--profile", "shakespeare", "up", "--no-color")
    assert again.returncode == 0 and "finished at step 30" in again.stderr + again.stdout
    sample = project.compose("run", "--rm", "-T", "sample", "--prompt", "KING", "--max-new-tokens", "5")
    assert sample.returncode == 0 and sample.stdout.startswith("KING")


def test_openwebtext_profile_trains_on_nanogpt_files(project: Project) -> None:
    project.config("openwebtext", dataset="openwebtext")
    folder = project.path("data", "openwebtext")
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, 50_257, 20_000).astype("<u2")
    tokens.tofile(folder / "train.bin")
    tokens[:2_000].tofile(folder / "val.bin")
    done = project.compose("--profile", "openwebtext", "up", "--no-color")
    assert done.returncode == 0 and state(project, "openwebtext")["step"] == 30, done.stderr


def test_two_ranks_train_together_in_one_container(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare", micro_batch_size=2)
    done = project.compose("run", "--rm", "-T", "shakespeare-prepare", "fetch", "shakespeare")
    assert done.returncode == 0, done.stderr
    done = project.compose("run", "--rm", "-T", "--no-deps", "multi-gpu", JOB="shakespeare")
    assert done.returncode == 0 and "× 2 ranks" in done.stderr + done.stdout, done.stderr
    assert state(project, "shakespeare")["step"] == 30


@pytest.fixture
def pretrained(project: Project) -> Path:
    """A small random GPT-2 as transformers saves it, in volumes/models."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = project.path("models", "small")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, attn_implementation="eager")
    GPT2LMHeadModel(config).save_pretrained(folder)
    subprocess.run(["chown", "-R", "1234:1234", folder], check=True)
    return folder


def test_finetune_profile_trains_on_the_text_in_the_variable_data(project: Project, pretrained: Path) -> None:
    settings = {"dataset": "shakespeare", "init_from": "small", "n_layer": None, "n_head": None, "n_embd": None}
    project.config("finetune", **settings)
    text = project.folder.parent / "my book.txt"
    text.write_text("It was a bright cold day in April. " * 400)
    text.chmod(0o644)
    done = project.compose("--profile", "finetune", "up", "--no-color", DATA=str(text))
    assert done.returncode == 0, done.stderr
    assert state(project, "finetune-my-book")["step"] == 30
    assert project.path("data", "my-book", "train.bin").exists()
    shutil.copy(text, project.folder / "notes.md")
    done = project.compose("--profile", "finetune", "up", "--no-color", DATA="./notes.md")
    assert done.returncode == 0 and state(project, "finetune-notes")["step"] == 30, done.stderr


def test_make_prepare_tokenizes_with_several_workers(project: Project) -> None:
    (project.folder / "notes").mkdir(mode=0o755)
    for name in ("a", "b"):
        (project.folder / "notes" / f"{name}.md").write_text(f"{name} was a bright cold day in April. " * 400)
    done = project.run("make", "prepare", "CPU=1", "DATA=notes", "ARGS=--name mine --max-docs 10 --workers 2")
    assert done.returncode == 0, done.stderr
    assert project.path("data", "mine", "train.bin").stat().st_uid == project.owner
    verified = project.compose("run", "--rm", "-T", "prepare", "--verify", "mine")
    assert verified.returncode == 0 and "hash to what dataset.json says" in verified.stderr, verified.stderr


def test_compose_stop_saves_and_up_resumes(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare", max_steps=100_000)
    assert project.compose("--profile", "shakespeare", "up", "--detach").returncode == 0
    metrics = project.path("runs", "shakespeare", "metrics.jsonl")
    wait_for(lambda: metrics.exists() and '"train"' in metrics.read_text())
    assert project.compose("--profile", "shakespeare", "stop").returncode == 0
    logs = project.compose("--profile", "shakespeare", "logs", "--no-color", "shakespeare").stdout
    assert "stopped by SIGTERM" in logs and "saved" in logs
    step = state(project, "shakespeare")["step"]
    assert isinstance(step, int) and step > 0
    project.config("shakespeare", dataset="shakespeare", max_steps=step + 10)
    again = project.compose("--profile", "shakespeare", "up", "--no-color")
    assert f"at step {step:,}" in again.stderr + again.stdout and state(project, "shakespeare")["step"] == step + 10


def test_training_has_no_network_and_writes_only_to_runs(project: Project) -> None:
    program = (
        "import pathlib, socket\n"
        "print([name for _, name in socket.if_nameindex()])\n"
        "places = '/volumes/data /volumes/models /configs /opt /volumes/runs /tmp /tmp/cache'\n"
        "for place in places.split():\n"
        "    try:\n"
        "        pathlib.Path(place, 'x').write_text('')\n"
        "        print('written', place)\n"
        "    except OSError:\n"
        "        pass\n"
    )
    done = project.compose("run", "--rm", "-T", "--no-deps", "shakespeare", "python", "-c", program)
    written = [f"written {place}" for place in ("/volumes/runs", "/tmp", "/tmp/cache")]
    assert done.stdout.splitlines() == ["['lo']", *written], done.stderr


def test_a_wrong_owner_stops_before_any_work(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare")
    done = project.compose("--profile", "shakespeare", "up", "--no-color", GPT2BOX_UID="4321", GPT2BOX_GID="4321")
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "sudo chown -R 4321:4321 volumes/" in output and "volumes/runs" in output
    assert not list(project.path("data").iterdir())


def test_a_missing_volume_is_not_made_by_docker_as_root(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare")
    project.path("models").rmdir()
    done = project.compose("--profile", "shakespeare", "up", "--no-color")
    assert done.returncode != 0 and "bind source path does not exist" in done.stderr
    assert not project.path("models").exists()


@pytest.fixture
def small_disk(project: Project) -> Iterator[Path]:
    """A disk of 24 MB in place of volumes/runs: room for one checkpoint of 19."""
    runs = project.path("runs")
    options = f"size=24m,uid={project.owner},gid={project.owner},mode=755"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", runs]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield runs
    project.compose("--profile", "shakespeare", "down", "--timeout", "1")
    subprocess.run(["umount", runs], check=True)


def test_full_disk_is_reported_before_the_work_and_damages_no_checkpoint(project: Project, small_disk: Path) -> None:
    project.config("shakespeare", dataset="shakespeare")
    done = project.compose("--profile", "shakespeare", "up", "--no-color")
    assert done.returncode != 0 and "the job writes" in done.stdout + done.stderr
    assert not list(project.path("data").iterdir())
    # Training without the check keeps the checkpoint it has.
    alone = ("run", "--rm", "-T", "--no-deps")
    assert project.compose(*alone, "shakespeare-prepare", "prepare", "shakespeare").returncode == 0
    done = project.compose(*alone, "shakespeare")
    assert done.returncode == 78 and "Traceback" not in done.stderr, done.stderr
    kept = sorted(path.name for path in (small_disk / "shakespeare" / "checkpoints").iterdir())
    assert kept == ["best", "last", "step-00000010"] and state(project, "shakespeare")["step"] == 10


def test_make_without_nvidia_runtime_fails_before_any_work(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare")
    for task in ("shakespeare", "train-medium", "finetune", "sample", "monitor", "watch", "bench", "preflight"):
        done = project.run("make", task)
        assert done.returncode != 0 and "NVIDIA Container Toolkit" in done.stderr and "CPU=1" in done.stderr
    assert not list(project.path("data").iterdir()) and not list(project.path("runs").iterdir())
    done = project.run("make", "shakespeare", PATH="/usr/local/sbin:/bin", DOCKER_HOST="unix:///nowhere.sock")
    assert done.returncode != 0 and "Docker" in done.stderr and "make demo" in done.stderr


def test_gpu_service_without_a_gpu_fails_before_the_preparation(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare")
    done = project.run("docker", "compose", "--profile", "shakespeare", "up", "--no-color")
    assert done.returncode != 0 and "could not select device driver" in done.stderr
    assert not list(project.path("data").iterdir())


def test_make_passes_on_options_and_failures(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare")
    done = project.run("make", "shakespeare", "CPU=1", "ARGS=--max-steps 12 --name short")
    assert done.returncode == 0 and state(project, "short")["step"] == 12, done.stderr
    done = project.run("scripts/compose.sh", "job", "shakespeare", "--dropout", "3", CPU="1")
    assert done.returncode == 2 and "dropout" in done.stderr
    done = project.run("make", "sample", "CPU=1", 'PROMPT=He said "stop; echo it"', "ARGS=--max-new-tokens 4")
    assert done.returncode == 0 and done.stdout.startswith('He said "stop; echo it"'), done.stderr
    done = project.run("make", "monitor", "CPU=1", "ARGS=--once")
    assert done.returncode == 0 and "short  finished  step 12/12" in done.stdout
    done = project.run("make", "runs")
    assert done.returncode == 0 and "short  finished  12 of 12" in done.stdout, done.stdout + done.stderr
    done = project.run("make", "report", "ARGS=short")
    assert done.returncode == 0 and (project.folder / "volumes/runs/short/report.html").exists(), done.stderr
    done = project.run("make", "finetune", "CPU=1", "DATA=nothing.txt")
    assert done.returncode != 0 and "no file or folder nothing.txt" in done.stderr
    done = project.run("scripts/compose.sh", "image", STACK="cu12")
    assert done.returncode == 2 and "STACK=cu121, cu13x or cpu" in done.stderr


def test_make_bench_stores_the_fastest_execution_plan(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare", micro_batch_size="auto", compile=False)
    done = project.run("make", "bench", "CPU=1", "JOB=shakespeare", "ARGS=--sweep --steps 2")
    assert done.returncode == 0 and "tokens/s" in done.stdout and "random tokens" in done.stderr, done.stderr
    assert project.path("runs", "bench.json").stat().st_uid == project.owner
    assert [path.name for path in project.path("runs").iterdir()] == ["bench.json"]
    done = project.compose("run", "--rm", "-T", "bench", "shakespeare", "--device", "cpu", "--share", "--steps", "1")
    assert done.returncode == 0 and done.stdout.startswith("| "), done.stderr


def test_make_finetune_reads_dotenv_and_passes_options_to_every_step(project: Project, pretrained: Path) -> None:
    project.config("finetune", dataset="shakespeare", init_from="missing", n_layer=None, n_head=None, n_embd=None)
    (project.folder / "Über uns (1).text").write_text("It was a bright cold day in April. " * 400)
    (project.folder / ".env").write_text('STACK="cpu"  # no card\r\nDATA="Über uns (1).text"\n')
    done = project.run("make", "finetune", "ARGS=--init-from small --max-steps 10")
    assert done.returncode == 0 and state(project, "finetune-Uber-uns-1")["step"] == 10, done.stderr


def test_make_stop_saves_what_make_started(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare", max_steps=100_000)
    command = ["make", "shakespeare", "CPU=1"]
    with project.start(*command) as job:
        metrics = project.path("runs", "shakespeare", "metrics.jsonl")
        wait_for(lambda: metrics.exists() and '"train"' in metrics.read_text())
        assert project.run("make", "stop", "CPU=1").returncode == 0
        assert job.wait(timeout=120) == 0
    assert int(str(state(project, "shakespeare")["step"])) > 0


def test_demo_profile_needs_no_gpu(project: Project) -> None:
    project.config("demo", dataset="shakespeare-char", device="cpu")
    done = project.run("docker", "compose", "--profile", "cpu-demo", "up", "--no-color")
    assert done.returncode == 0 and state(project, "demo")["step"] == 30, done.stderr


def test_tensorboard_is_published_to_this_machine_only(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare")
    assert project.compose("--profile", "shakespeare", "up").returncode == 0
    assert project.compose("--profile", "tensorboard", "up", "--detach").returncode == 0
    answer: dict[str, dict[str, object]] = {}

    def serves() -> bool:
        try:
            with urllib.request.urlopen("http://127.0.0.1:6006/data/plugin/scalars/tags", timeout=5) as response:
                answer.update(json.load(response))
        except OSError:
            return False
        return bool(answer)

    wait_for(serves)
    assert "eval/val_loss" in answer["shakespeare/tensorboard"] and "train/loss" in answer["shakespeare/tensorboard"]
    ports = docker("ps", "--format", "{{.Ports}}", "--filter", f"name={project.folder.parent.name}").stdout
    assert "127.0.0.1:6006" in ports and "0.0.0.0" not in ports


def test_dashboard_is_published_to_this_machine_only_and_only_reads(project: Project) -> None:
    project.config("shakespeare", dataset="shakespeare")
    assert project.compose("--profile", "shakespeare", "up").returncode == 0
    before = sorted(project.path("runs", "shakespeare").rglob("*"))
    assert project.compose("--profile", "dashboard", "up", "--detach").returncode == 0
    shown: dict[str, object] = {}

    def serves() -> bool:
        try:
            with urllib.request.urlopen("http://127.0.0.1:8080/api/now", timeout=5) as response:
                shown.update(json.load(response)["run"])
        except OSError:
            return False
        return True

    wait_for(serves)
    assert (shown["name"], shown["state"]) == ("shakespeare", "finished")
    foreign = urllib.request.Request("http://127.0.0.1:8080/api/now", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="421"):
        urllib.request.urlopen(foreign, timeout=5)
    ports = docker("ps", "--format", "{{.Ports}}", "--filter", f"name={project.folder.parent.name}").stdout
    assert "127.0.0.1:8080" in ports and "0.0.0.0" not in ports
    assert sorted(project.path("runs", "shakespeare").rglob("*")) == before
