"""What others do to a run's folder, its dataset and its files while it trains."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from gpt2box.checkpoint import retention
from gpt2box.data.dataloader import TrainWindows, micro_batches
from gpt2box.data.dataset import open_dataset
from gpt2box.data.downloads import sha256_of
from gpt2box.errors import Damaged
from gpt2box.training.resume import make_dataset_check
from gpt2box.utils.files import file_lock
from tests.helpers.training import process, train, wait_for

LONG = {"name": "run", "max_steps": 1_000_000, "save_interval": 20, "eval_interval": 20, "log_interval": 20}


def end_of(volumes: Path, name: str) -> list[str]:
    last = volumes / "runs" / name / "checkpoints/last"
    return [sha256_of(last / file) for file in ("model.safetensors", "optimizer.safetensors")]


def test_a_run_whose_folder_is_anothers_by_now_writes_nothing_there(volumes: Path) -> None:
    train("alone", seed=7)
    running = process(volumes, **LONG)
    run = volumes / "runs/run"
    wait_for(run / "checkpoints" / retention.checkpoint_name(20), running)
    os.rename(run, volumes / "moved")
    train("run", seed=7)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 78, errors
    assert f"{run} is not the folder any more that this began in" in errors or f"{run} is gone" in errors, errors
    assert "Traceback" not in errors
    assert end_of(volumes, "run") == end_of(volumes, "alone")
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1] == retention.checkpoint_name(20)


@pytest.mark.parametrize("what", ["replaced", "gone"])
def test_a_dataset_that_is_another_by_now_ends_the_run(volumes: Path, what: str) -> None:
    running = process(volumes, **LONG)
    wait_for(volumes / "runs/run/checkpoints" / retention.checkpoint_name(20), running)
    os.rename(volumes / "data/text", volumes / "data/before")
    if what == "replaced":
        shutil.copytree(volumes / "data/before", volumes / "data/text")
        path = volumes / "data/text/val.bin"
        path.write_bytes(path.read_bytes()[::-1])
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 4 and "Traceback" not in errors, errors
    assert ("val.bin does not hash" if what == "replaced" else "changed or removed while the run trained") in errors


def test_a_dataset_that_was_only_touched_is_the_same(volumes: Path) -> None:
    dataset = open_dataset(volumes / "data/text")
    check = make_dataset_check(dataset, volumes / "runs/run")
    os.utime(volumes / "data/text/train.bin")
    check()
    (volumes / "data/text/train.bin").write_bytes(b"\0" * (volumes / "data/text/train.bin").stat().st_size)
    with pytest.raises(Damaged, match=r"train\.bin does not hash"):
        check()


def test_nanogpts_dataset_that_was_only_touched_is_the_same(volumes: Path) -> None:
    folder = volumes / "data/nano"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        shutil.copy(volumes / "data/text" / name, folder)
    train("run", dataset="nano", max_steps=5)
    check = make_dataset_check(open_dataset(folder), volumes / "runs/run")
    os.utime(folder / "train.bin", (1, 1))
    check()
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[::-1])
    with pytest.raises(Damaged, match="was changed or removed while the run trained"):
        check()


def test_a_dataset_that_cannot_be_opened_is_no_reader_that_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        next(micro_batches(tmp_path / "train.bin", TrainWindows(1000, 8, 1), 500, 0, 4, pin=False, ranks=1))


def test_events_that_cannot_be_written_are_said_and_the_run_goes_on(volumes: Path) -> None:
    running = process(volumes, **{**LONG, "max_steps": 60})
    wait_for(volumes / "runs/run/checkpoints" / retention.checkpoint_name(20), running)
    shutil.rmtree(volumes / "runs/run/tensorboard")
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0 and "run: finished at step 60" in errors, errors
    assert errors.count("no more events for TensorBoard") == 1 and "Traceback" not in errors


def test_a_lock_that_is_waited_for_is_had_when_the_other_ends(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with file_lock(tmp_path / "lock", "it is held", wait=True):
            order.append("second")

    with file_lock(tmp_path / "lock", "it is held"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
