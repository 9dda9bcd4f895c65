"""SIGKILL at random moments, in real processes: the same command goes on, and ends in the same bits.

$FAULT_KILLS: how many (`make test-faults`: 300); $FAULT_SEED: of the moments.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.disk_faults import DEATH, KILLED, NEVER, Ended, Server, digests, half_made, with_data
from tests.helpers.settings import TINYSHAKESPEARE

KILLS = int(os.environ.get("FAULT_KILLS", "10"))
SEED = int(os.environ.get("FAULT_SEED", "1"))
DONE = "is there already"  # what export says where the kill came after it had given the whole its name
MOST_IN_A_ROW = 3  # kills before a command may run to its end

TRAIN = {"name": "run", "max_steps": 40, "eval_interval": 20, "save_interval": 10, "dropout": 0.1, "keep_last": 2}
LEAN = {**TRAIN, "weights_dtype": "bfloat16", "optimizer_states": "int8", "optimizer_in_backward": True}


@dataclass
class Task:
    """A command, what it changes and what it is to end in."""

    name: str
    share: float  # of all kills
    run: Callable[..., Ended]
    result: Callable[[], dict[str, str]]
    changes: Path
    at_a_call: bool  # killed at one of the calls that change the disk, not after a time

    def begin_anew(self) -> None:
        shutil.rmtree(self.changes, ignore_errors=True)


def tasks(server: Server, prepared: Path, folder: Path) -> list[Task]:
    """All that is killed."""
    found = []

    def train(name: str, share: float, settings: dict[str, object], at_a_call: bool, poison: object = None) -> None:
        volumes = with_data(prepared, folder / name.replace(" ", "-"))
        end = volumes / "runs/run/checkpoints/step-00000040"

        def run(**more: object) -> Ended:
            return server.train(volumes, settings, poison=poison, **more)

        found.append(Task(name, share, run, lambda: digests(end), volumes / "runs", at_a_call))

    train("train", 0.3, TRAIN, False)
    train("save", 0.2, {**TRAIN, "save_interval": 2}, True)
    train("save and prune", 0.2, {**TRAIN, "save_interval": 1, "keep_last": 1}, True)
    train("in little memory", 0.05, LEAN, False)
    train("back to a checkpoint", 0.05, TRAIN, True, poison=[23, 30])

    volumes = folder / "prepare"
    (volumes / "data/raw").mkdir(parents=True)
    for path in (prepared / "data/raw").iterdir():
        shutil.copy(path, volumes / "data/raw")
    (folder / "text.txt").write_text(TINYSHAKESPEARE.read_text()[:200_000])
    command = ["prepare", str(folder / "text.txt"), "--name", "made"]
    made = volumes / "data/made"
    found.append(
        Task("prepare", 0.1, lambda **more: server.run(volumes, *command, **more), lambda: digests(made), made, False)
    )
    trained = with_data(prepared, folder / "export")
    assert server.train(trained, TRAIN).code == 0
    out = trained / "runs/run/export"
    found.append(
        Task(
            "export", 0.1, lambda **more: server.run(trained, "export", "run", **more), lambda: digests(out), out, True
        )
    )
    return found


@pytest.mark.parametrize("kills", [KILLS])
def test_a_kill_at_any_moment_loses_nothing(server: Server, prepared: Path, tmp_path: Path, kills: int) -> None:
    chance = random.Random(SEED)
    tried, lost = Counter[str](), Counter[str]()
    faults = []
    for task in tasks(server, prepared, tmp_path):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        task.begin_anew()
        straight = task.run(fault=[str(task.changes.parent), NEVER, 0, False, str(calls)])
        assert straight.code == 0, straight.said
        expected, count = task.result(), len(calls.read_text().splitlines())
        assert expected
        while tried[task.name] < max(1, round(kills * task.share)):
            task.begin_anew()
            moments = []
            for _ in range(chance.randint(1, MOST_IN_A_ROW)):
                if task.at_a_call:
                    moment: dict[str, object] = {
                        "fault": [str(task.changes.parent), chance.randint(1, count), DEATH, False, ""]
                    }
                else:
                    moment = {"kill_after": chance.uniform(0, straight.seconds)}
                ended = task.run(**moment)
                moments.append(moment)
                tried[task.name] += ended.code == KILLED
                if ended.code not in (0, KILLED) and DONE not in ended.said:
                    faults.append(f"{task.name}, {moments}: {ended.said[-2000:]}")
            ended = task.run()
            if (ended.code != 0 and DONE not in ended.said) or task.result() != expected or half_made(task.changes):
                lost[task.name] += 1
                faults.append(f"{task.name}, {moments}: exit code {ended.code}\n{ended.said[-2000:]}")
        print(f"  {task.name:22} {tried[task.name]:4} kills, {lost[task.name]} lost", flush=True)
    total = sum(tried.values())
    print(f"{total} SIGKILLs tried, {total - sum(lost.values())} survived, {sum(lost.values())} lost (seed {SEED})")
    assert not faults, "\n".join(faults[:5])
