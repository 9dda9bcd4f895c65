"""What others do to a run's folder, its dataset and its files while it trains."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2box.checkpoint import retention
from gpt2box.checkpoint.async_writer import AsyncCheckpointWriter
from gpt2box.checkpoint.metadata import TrainState, load_verified_state
from gpt2box.checkpoint.writer import save_checkpoint
from gpt2box.data.dataloader import TrainWindows, micro_batches
from gpt2box.data.dataset import open_dataset
from gpt2box.data.downloads import sha256_of
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.errors import Damaged
from gpt2box.training.resume import unchanged
from gpt2box.utils.files import locked
from tests.helpers.models import tiny_model
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
    check = unchanged(dataset, volumes / "runs/run")
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
    check = unchanged(open_dataset(folder), volumes / "runs/run")
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


def saves(folder: Path, rank: int, vocabulary: Tokenizer, begin: Callable[[], object]) -> None:
    """What a rank does whose memory ran out, five times."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x"}
    os.environ |= {name: str(value) for name, value in said.items()} | {"MASTER_PORT": "1"}
    torch.set_num_threads(1)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(5, 10):
        begin()
        save_checkpoint(folder, model, optimizer, TrainState(step=step), vocabulary)


def test_ranks_that_save_at_once_do_not_remove_each_others_files(tmp_path: Path) -> None:
    from tests.helpers.models import VOCABULARY

    fresh = multiprocessing.get_context("spawn")
    together = fresh.Barrier(2)
    folder = tmp_path / "checkpoints"
    both = [fresh.Process(target=saves, args=(folder, rank, VOCABULARY, together.wait)) for rank in (0, 1)]
    for one in both:
        one.start()
    for one in both:
        one.join(120)
    assert [one.exitcode for one in both] == [0, 0]
    assert [load_verified_state(path).step for path in sorted(folder.glob("step-*"))] == [5, 6, 7, 8, 9]
    assert not list(folder.glob(".step-*"))


def test_what_befell_a_save_does_not_take_the_place_of_what_ended_the_run(volumes: Path) -> None:
    said: list[str] = []
    saver = AsyncCheckpointWriter.__new__(AsyncCheckpointWriter)
    saver._thread, saver._error, saver._log = None, OSError(5, "Input/output error"), said.append
    saver.close()
    assert said == ["[Errno 5] Input/output error"]


def test_a_lock_that_is_waited_for_is_had_when_the_other_ends(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path / "lock", "it is held", wait=True):
            order.append("second")

    with locked(tmp_path / "lock", "it is held"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
