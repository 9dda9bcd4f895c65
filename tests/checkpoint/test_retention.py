"""Which checkpoints a run keeps, finds again and rolls back to."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2box.checkpoint.metadata import REQUIRED_FILES, TrainState, write_state
from gpt2box.checkpoint.retention import (
    checkpoint_name,
    delete_old_checkpoints,
    find_newest_checkpoint,
    recover_interrupted_saves,
    rollback_candidates,
    set_link,
    update_links,
)
from gpt2box.data.downloads import sha256_of
from gpt2box.errors import BadInput, Damaged
from gpt2box.utils.paths import checkpoint_step, list_checkpoints


def save(folder: Path, step: int, **values: int) -> TrainState:
    """Write a checkpoint whose files are empty; returns its state."""
    path = folder / checkpoint_name(step)
    path.mkdir()
    for name in REQUIRED_FILES:
        (path / name).touch()
    state = TrainState(step=step, **values)  # type: ignore[arg-type]
    write_state(path, state, {name: {"bytes": 0, "sha256": sha256_of(path / name)} for name in REQUIRED_FILES})
    return state


def saved_steps(folder: Path) -> list[int]:
    return [checkpoint_step(path) for path in list_checkpoints(folder)]


def test_the_newest_the_best_and_two_rollback_candidates_with_their_best_are_kept(tmp_path: Path) -> None:
    for step, best in ((10, 10), (20, 10), (30, 10), (35, 35), (40, 35), (50, 35), (57, 35)):
        state = save(tmp_path, step, best_step=best)
    delete_old_checkpoints(tmp_path, 2, state, save_interval=10)
    assert saved_steps(tmp_path) == [35, 40, 50, 57]
    state = save(tmp_path, 60, best_step=60)
    delete_old_checkpoints(tmp_path, 1, state, save_interval=10)
    assert saved_steps(tmp_path) == [35, 50, 60]  # 35 is the best as of 50


def test_checkpoints_beyond_the_current_step_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    states = [save(tmp_path, step, best_step=10) for step in (10, 20, 30, 40)]
    delete_old_checkpoints(tmp_path, 1, states[1], save_interval=100)
    assert saved_steps(tmp_path) == [10, 20, 30, 40]


def test_rollback_candidates_are_regular_saves_and_bests_without_bad_steps(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 15, best_step=15)
    save(tmp_path, 17)  # saved because of a signal or the clock
    save(tmp_path, 20, bad_steps=2)
    save(tmp_path, 30)
    (tmp_path / checkpoint_name(30) / "state.json").write_text("{")
    assert [checkpoint_step(path) for path, _ in rollback_candidates(list_checkpoints(tmp_path), 10)] == [15, 10]


def test_the_newest_intact_checkpoint_is_found_and_damaged_ones_are_reported(tmp_path: Path) -> None:
    assert find_newest_checkpoint(tmp_path / "missing") is None and find_newest_checkpoint(tmp_path) is None
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / checkpoint_name(20) / "config.json").write_text("x")
    found = find_newest_checkpoint(tmp_path)
    assert found and found[1].step == 10 and len(found[2]) == 1
    (tmp_path / checkpoint_name(10) / "config.json").unlink()
    with pytest.raises(Damaged):
        find_newest_checkpoint(tmp_path)


def test_a_killed_save_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / checkpoint_name(10)).rename(tmp_path / f".{checkpoint_name(10)}.old")
    (tmp_path / f".{checkpoint_name(10)}.tmp").mkdir()
    recover_interrupted_saves(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint_name(10)]
    (tmp_path / f".{checkpoint_name(10)}.old").mkdir()  # its replacement is in place
    recover_interrupted_saves(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint_name(10)]


def test_links_follow_the_state_and_replace_only_copies_of_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 10)
    update_links(tmp_path, save(tmp_path, 20, best_step=10))
    assert (tmp_path / "last").resolve().name == checkpoint_name(20)
    assert (tmp_path / "best").resolve().name == checkpoint_name(10)
    (tmp_path / "last").unlink()
    (tmp_path / "last").mkdir()
    with pytest.raises(BadInput):
        set_link(tmp_path, "last", 20)
    content = (tmp_path / checkpoint_name(20) / "state.json").read_bytes()
    (tmp_path / "last" / "state.json").write_bytes(content)
    set_link(tmp_path, "last", 20)
    assert (tmp_path / "last").is_symlink()
