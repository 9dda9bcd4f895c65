"""Batches are a pure function of (seed, step)."""

from __future__ import annotations

from contextlib import closing
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2box.data.dataloader import TrainWindows, micro_batches, permute_index, val_window_starts
from gpt2box.errors import BadInput

T = 16


def ids_file(path: Path, tokens: int = 1000, highest: int = 60_000) -> Path:
    (np.arange(tokens) % highest).astype("<u2").tofile(path)
    return path


def batches(path: Path, first: int, size: int, count: int, seed: int = 1) -> torch.Tensor:
    windows = TrainWindows(1000, T, seed)
    with closing(micro_batches(path, windows, 60_000, first, size, pin=False, ranks=1)) as source:
        return torch.cat(list(islice(source, count)))


@given(count=st.integers(1, 500), key=st.binary(min_size=1, max_size=32))
def test_the_order_is_a_permutation(count: int, key: bytes) -> None:
    assert sorted(permute_index(i, count, key) for i in range(count)) == list(range(count))


@given(tokens=st.integers(2, 3000), block_size=st.integers(1, 300), seed=st.integers(0, 9))
def test_an_epoch_visits_windows_inside_the_file_once_each(tokens: int, block_size: int, seed: int) -> None:
    if tokens <= block_size:
        with pytest.raises(BadInput, match="too few for block_size"):
            TrainWindows(tokens, block_size, seed)
        return
    windows = TrainWindows(tokens, block_size, seed)
    for epoch in range(3):
        starts = sorted(windows.start(epoch * windows.count + i) for i in range(windows.count))
        assert starts[0] >= 0 and starts[-1] + block_size + 1 <= tokens
        assert all(b - a == block_size for a, b in pairwise(starts))
        assert tokens - windows.count * block_size <= 2 * block_size  # next to nothing left out


def test_epochs_differ_in_order_and_in_cut() -> None:
    windows = TrainWindows(100_000, T, seed=1)
    epochs = [[windows.start(e * windows.count + i) for i in range(windows.count)] for e in range(5)]
    assert len({tuple(epoch) for epoch in epochs}) == 5 and all(epoch != sorted(epoch) for epoch in epochs)
    assert len({start % T for epoch in epochs for start in epoch}) > 2


def test_the_micro_batch_size_does_not_change_what_a_step_sees(tmp_path: Path) -> None:
    path = ids_file(tmp_path / "train.bin")
    assert torch.equal(batches(path, 0, 2, 12), batches(path, 0, 8, 3))


def test_starting_in_the_middle_gives_the_same_batches(tmp_path: Path) -> None:
    path = ids_file(tmp_path / "train.bin")
    assert torch.equal(batches(path, 0, 4, 50)[120:], batches(path, 120, 4, 20))
    assert not torch.equal(batches(path, 0, 4, 5), batches(path, 0, 4, 5, seed=2))


def test_targets_are_the_inputs_moved_by_one(tmp_path: Path) -> None:
    batch = batches(ids_file(tmp_path / "train.bin"), 0, 4, 3)
    assert batch.shape == (12, T + 1) and batch.dtype == torch.int32
    assert torch.equal(batch[:, 1:], batch[:, :-1] + 1)


def test_an_id_beyond_the_vocabulary_stops_before_the_model(tmp_path: Path) -> None:
    path = ids_file(tmp_path / "train.bin")
    with (
        closing(micro_batches(path, TrainWindows(1000, T, 1), 500, 0, 60, pin=False, ranks=1)) as source,
        pytest.raises(BadInput, match="ids below 500"),
    ):
        next(source)


def test_validation_windows_are_fixed_spread_and_apart() -> None:
    starts = val_window_starts(10_001, 100, 30)
    assert len(starts) == 30 and starts[0] == 0 and starts[-1] > 9000
    assert (np.diff(starts) >= 100).all()
    assert len(val_window_starts(10_001, 100, 0)) == len(val_window_starts(10_001, 100, 5000)) == 100
    with pytest.raises(BadInput, match="block_size at most 99"):
        val_window_starts(100, 100, 1)
