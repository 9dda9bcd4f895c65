"""`gpt2box bench`: its measurements, and how the planner uses a sweep's records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2box.bench.bench import bench
from gpt2box.config import loader
from gpt2box.config.schema import Config
from gpt2box.errors import MachineCannot
from gpt2box.planner.bench_records import BenchRecord, bench_key, read_bench_records, store_bench_records
from gpt2box.planner.memory import GIB
from gpt2box.planner.model_shape import resolve_model_shape
from gpt2box.planner.search import choose_execution_plan, first_fitting_plan, list_execution_plans
from gpt2box.planner.target_device import TargetDevice, apply_bench_records
from gpt2box.system.host import cpu_name
from gpt2box.utils.paths import bench_file
from tests.helpers.commands import Command
from tests.helpers.operator_faults import Refuse
from tests.helpers.settings import options as tiny

SMALL = {"micro_batch_size": "auto", "name": "run", "compile": "false"}


def config(**changes: object) -> Config:
    flags = dict(word[2:].replace("-", "_").split("=", 1) for word in tiny(**{**SMALL, **changes}))
    return loader.load_config(None, flags)[0]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_bench_measures_the_steps_of_a_run_and_leaves_no_files(gpt2box: Command, volumes: Path) -> None:
    before = files(volumes)
    done = gpt2box("bench", *tiny(**SMALL), "--steps", "3", "--json")
    assert done.returncode == 0 and files(volumes) == before, done.stderr
    found = json.loads(done.stdout)
    measured, way = found["measured"], found["way"]
    assert way["micro_batch_size"] == 4 and way["grad_accum_steps"] == 2
    assert measured["tokens_per_sec"] == pytest.approx(256 / measured["step_s"])
    assert all(measured[key] > 0 for key in ("loader_s", "evaluation_s", "checkpoint_s", "checkpoint_bytes"))
    assert measured["evaluation_windows"] == 8 and measured["mfu"] is None  # the peak of a CPU is unknown
    assert found["estimated"]["memory_bytes"] == way["memory_bytes_estimated"] > 0
    assert measured["checkpoint_s"] < measured["checkpoint_durable_s"]
    assert found["estimated"]["checkpoint_bytes"] == pytest.approx(measured["checkpoint_bytes"], rel=0.5)


def test_bench_without_dataset_or_volumes_uses_random_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("GPT2BOX_VOLUMES", str(blocked / "volumes"))
    bench(config(), steps=1, sweep=False, share=True, as_json=False)
    shown = capsys.readouterr()
    assert "random tokens" in shown.err
    cells = shown.out.strip().strip("|").split("|")
    header = (Path(__file__).parents[2] / "docs" / "cards.md").read_text().split("| card |")[1].splitlines()[0]
    assert len(cells) == len(header.strip("|").split("|")) + 1 and cells[0].strip() == cpu_name()
    bench(config(), steps=1, sweep=False, share=False, as_json=False)
    assert "not tried: cannot create" in capsys.readouterr().out


def test_plan_and_train_use_the_fastest_execution_plan_of_a_sweep(
    volumes: Path, capsys: pytest.CaptureFixture[str], gpt2box: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # like the command
    bench(config(activation_checkpointing="auto"), steps=2, sweep=True, share=False, as_json=True)
    found = json.loads(capsys.readouterr().out)
    rates = [way["tokens_per_sec"] for way in found["ways"]]
    assert len(rates) == 9 and rates == sorted(
        rates, reverse=True
    )  # 3 micro-batch sizes, 3 modes of activation checkpointing
    best = found["way"]
    settings = tiny(**{**SMALL, "max_steps": 2, "activation_checkpointing": "auto"})
    plan = gpt2box("plan", *settings, "--json")
    chosen = json.loads(plan.stdout)["chosen"]
    assert json.loads(plan.stdout)["kind"] == chosen["kind"] == "measured here"
    for key in ("micro_batch_size", "activation_checkpointing", "grad_accum_steps"):
        assert chosen[key] == best[key]
    trained = gpt2box("train", *settings)
    assert trained.returncode == 0 and "measured here (gpt2box bench)" in trained.stderr, trained.stderr
    recorded = json.loads((volumes / "runs/run/plan.json").read_text())
    assert recorded["micro_batch_size"] == best["micro_batch_size"] and recorded["speed_measured"]


def test_running_out_of_memory_is_recorded_as_a_result(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_kind = config(activation_checkpointing="none")
    with Refuse("gelu_backward", 1, times=1):  # in the first round of the first execution plan
        bench(one_kind, steps=1, sweep=True, share=False, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [way["fault"] for way in found["ways"]] == [None, None, "out of memory"]
    kept = {record.plan_key: record for record in read_bench_records(bench_file(), cpu_name())}
    assert not kept[1, "none", False].fits and kept[1, "none", False].free_bytes == found["free_bytes"]
    with Refuse("gelu_backward", 1, times=10_000), pytest.raises(MachineCannot, match="nothing could be measured"):
        bench(one_kind, steps=1, sweep=True, share=False, as_json=False)


def test_ctrl_c_keeps_the_measurements_so_far(volumes: Path) -> None:
    command = [sys.executable, "-m", "gpt2box", "bench", *tiny(**SMALL), "--sweep", "--json", "--steps", "600"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as job:
        end = time.monotonic() + 600
        while not list((volumes / "runs").glob("bench.json")) and time.monotonic() < end and job.poll() is None:
            time.sleep(0.05)
        job.send_signal(signal.SIGINT)
        found = json.loads(job.communicate(timeout=600)[0])
    assert job.returncode == 130
    assert found["interrupted"] and bench_file().exists()


def record_of(way: tuple[int, str, bool], one_s: float, many_s: float, **changes: object) -> BenchRecord:
    plain = loader.load_config("openwebtext", {})[0]
    job = bench_key("a card", plain, resolve_model_shape(plain), "bfloat16")
    values: dict[str, Any] = {"fits": True, "free_bytes": 12 * GIB, "peak_bytes": 9 * GIB, **changes}
    return BenchRecord(job, *way, one_s=one_s, many_s=many_s, **values)


CARD = TargetDevice("a card", 11 * GIB, None, "bfloat16", on_gpu=True, compiled=True, bench_name="a card")


def test_measured_execution_plans_come_before_estimated_ones(volumes: Path) -> None:
    plain = loader.load_config("openwebtext", {})[0]
    shape = resolve_model_shape(plain)
    (volumes / "runs").mkdir()
    slow, fast = record_of((2, "none", True), 0.3, 0.7), record_of((1, "full", True), 0.1, 0.2)
    assert slow.step_s(3) == 0.7 and slow.step_s(32) == pytest.approx(0.3 + 31 * 0.2)
    store_bench_records(bench_file(), [slow, fast])
    place = apply_bench_records(CARD, plain, shape)
    found = list_execution_plans(plain, shape, place)
    assert [(way.micro_batch_size, way.activation_checkpointing) for way in found[:2]] == [(1, "full"), (2, "none")]
    assert choose_execution_plan(found, plain, shape, place).measured and found[0].total_bytes == 9 * GIB
    # Measured memory exceeds what is free now, so another plan is chosen.
    store_bench_records(bench_file(), [replace(fast, peak_bytes=20 * GIB)])
    again = list_execution_plans(plain, shape, apply_bench_records(CARD, plain, shape))
    assert choose_execution_plan(again, plain, shape, place).micro_batch_size == 2


def test_an_execution_plan_that_ran_out_of_memory_is_used_again_only_with_more_memory(volumes: Path) -> None:
    plain = loader.load_config("openwebtext", {})[0]
    shape = resolve_model_shape(plain)
    (volumes / "runs").mkdir()
    usual = first_fitting_plan(list_execution_plans(plain, shape, CARD), CARD)
    assert usual
    way = (usual.micro_batch_size, usual.activation_checkpointing, True)
    store_bench_records(bench_file(), [record_of(way, 0.0, 0.0, fits=False, peak_bytes=0, free_bytes=12 * GIB)])
    now = first_fitting_plan(list_execution_plans(plain, shape, apply_bench_records(CARD, plain, shape)), CARD)
    assert now and now.describe() != usual.describe()
    larger = apply_bench_records(replace(CARD, free_bytes=13 * GIB), plain, shape)
    assert any(
        option.describe() == usual.describe()
        for option in list_execution_plans(plain, shape, larger)
        if option.total_bytes < 13 * GIB
    )


def test_compile_auto_follows_the_measurements_if_both_modes_were_measured(volumes: Path) -> None:
    plain = loader.load_config("openwebtext", {})[0]
    shape = resolve_model_shape(plain)
    (volumes / "runs").mkdir()
    store_bench_records(bench_file(), [record_of((2, "none", False), 0.1, 0.3)])
    assert apply_bench_records(CARD, plain, shape).compiled
    store_bench_records(bench_file(), [record_of((2, "none", True), 0.2, 0.6)])
    assert not apply_bench_records(CARD, plain, shape).compiled
    store_bench_records(bench_file(), [record_of((2, "none", True), 0.102, 0.306)])  # no clear difference: the default
    assert apply_bench_records(CARD, plain, shape).compiled
    store_bench_records(bench_file(), [record_of((2, "none", True), 0.2, 0.6)])
    assert apply_bench_records(CARD, plain.model_copy(update={"compile": True}), shape).compiled
    assert apply_bench_records(CARD, plain.model_copy(update={"dropout": 0.1}), shape).compiled  # no record of that job
    assert apply_bench_records(replace(CARD, bench_name="another"), plain, shape).bench_records == []


def test_a_new_record_replaces_the_old_one_and_damaged_records_are_ignored(volumes: Path) -> None:
    (volumes / "runs").mkdir()
    first, other = record_of((2, "none", True), 0.3, 0.7), record_of((2, "full", True), 0.3, 0.8)
    store_bench_records(bench_file(), [first, other])
    store_bench_records(bench_file(), [replace(first, one_s=0.1)])
    assert sorted(record.one_s for record in read_bench_records(bench_file(), "a card")) == [0.1, 0.3]
    content = json.loads(bench_file().read_text())
    content["measured"][0].pop("one_s")
    content["measured"].append({"job": 7})
    bench_file().write_text(json.dumps(content))
    assert len(read_bench_records(bench_file(), "a card")) == 1
    bench_file().write_text("{")
    assert read_bench_records(bench_file(), "a card") == []
    store_bench_records(bench_file(), [first])
    assert read_bench_records(bench_file(), "a card") == [first]


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["nothing"], 2, "no config 'nothing'"),
        (["demo", "--steps", "0"], 2, "--steps"),
        (["demo", "--share", "--json"], 2, "--share and --json"),
        (["demo", "--device", "cuda"], 3, "device cuda"),
        (["demo", "--sweep", "--n-layer", "400", "--n-embd", "20000"], 3, "the least that these settings need"),
        (["demo", "--micro-batch-size", "5"], 2, "tokens_per_step"),
    ],
)
def test_bad_options_of_bench_fail_with_their_exit_code(
    gpt2box: Command, volumes: Path, arguments: list[str], code: int, part: str
) -> None:
    done = gpt2box("bench", *arguments)
    assert done.returncode == code and part in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_sweep_is_refused_if_its_records_cannot_be_written(gpt2box: Command, tmp_path: Path) -> None:
    (tmp_path / "work" / "volumes").touch()
    done = gpt2box("bench", "demo", "--sweep", "--device", "cpu")
    assert done.returncode == 78 and "cannot create" in done.stderr
