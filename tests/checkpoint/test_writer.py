"""Checkpoints that several ranks save at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch

from gpt2box.checkpoint.metadata import TrainState, load_verified_state
from gpt2box.checkpoint.writer import save_checkpoint
from tests.helpers.models import VOCABULARY, tiny_model


def save_five_times(folder: Path, rank: int, wait_for_other: Callable[[], object]) -> None:
    """Save steps 5 to 9 as rank `rank` of two, each at the same time as the other rank."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x"}
    os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_PORT": "1"}
    torch.set_num_threads(1)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(5, 10):
        wait_for_other()
        save_checkpoint(folder, model, optimizer, TrainState(step=step), VOCABULARY)


def test_ranks_that_save_at_once_keep_each_others_files(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    folder = tmp_path / "checkpoints"
    ranks = [spawn.Process(target=save_five_times, args=(folder, rank, barrier.wait)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert [load_verified_state(path).step for path in sorted(folder.glob("step-*"))] == [5, 6, 7, 8, 9]
    assert not list(folder.glob(".step-*"))
