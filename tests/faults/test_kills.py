"""SIGKILL at random moments in real processes: the same command resumes and ends with bit-identical files.

$FAULT_KILLS: number of kills (`make test-faults`: 300); $FAULT_SEED: seed of the moments.
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

from tests.helpers.disk_faults import (
    KILLED,
    NEVER,
    SIGKILL,
    CommandServer,
    Result,
    hash_outputs,
    leftovers,
    volumes_with_data,
)
from tests.helpers.settings import TINYSHAKESPEARE

KILLS = int(os.environ.get("FAULT_KILLS", "10"))
SEED = int(os.environ.get("FAULT_SEED", "1"))
DONE = "is there already"  # export's error if the kill came after it had published its result
MAX_CONSECUTIVE_KILLS = 3  # before a command may run to its end

TRAIN = {"name": "run", "max_steps": 40, "eval_interval": 20, "save_interval": 10, "dropout": 0.1, "keep_last": 2}
LOW_MEMORY = {**TRAIN, "weights_dtype": "bfloat16", "optimizer_states": "int8", "optimizer_in_backward": True}


@dataclass
class Task:
    """A command to kill, the folder that it changes, and the result to compare."""

    name: str
    share: float  # of all kills
    run: Callable[..., Result]
    result: Callable[[], dict[str, str]]
    changes: Path
    at_call: bool  # kill it at a call that changes the disk, not after a time

    def reset(self) -> None:
        shutil.rmtree(self.changes, ignore_errors=True)


def tasks(server: CommandServer, prepared: Path, folder: Path) -> list[Task]:
    """List the commands to kill."""
    result = []

    def train(name: str, share: float, settings: dict[str, object], at_call: bool, poison: object = None) -> None:
        volumes = volumes_with_data(prepared, folder / name.replace(" ", "-"))
        end = volumes / "runs/run/checkpoints/step-00000040"

        def run(**faults: object) -> Result:
            return server.train(volumes, settings, poison=poison, **faults)

        result.append(Task(name, share, run, lambda: hash_outputs(end), volumes / "runs", at_call))

    train("train", 0.3, TRAIN, False)
    train("save", 0.2, {**TRAIN, "save_interval": 2}, True)
    train("save and delete", 0.2, {**TRAIN, "save_interval": 1, "keep_last": 1}, True)
    train("train with low memory", 0.05, LOW_MEMORY, False)
    train("rollback", 0.05, TRAIN, True, poison=[23, 30])

    volumes = folder / "prepare"
    (volumes / "data/raw").mkdir(parents=True)
    for path in (prepared / "data/raw").iterdir():
        shutil.copy(path, volumes / "data/raw")
    (folder / "text.txt").write_text(TINYSHAKESPEARE.read_text()[:200_000])
    command = ["prepare", str(folder / "text.txt"), "--name", "made"]
    made = volumes / "data/made"
    result.append(
        Task(
            "prepare",
            0.1,
            lambda **faults: server.run(volumes, *command, **faults),
            lambda: hash_outputs(made),
            made,
            False,
        )
    )
    trained = volumes_with_data(prepared, folder / "export")
    assert server.train(trained, TRAIN).exit_code == 0
    out = trained / "runs/run/export"
    result.append(
        Task(
            "export",
            0.1,
            lambda **faults: server.run(trained, "export", "run", **faults),
            lambda: hash_outputs(out),
            out,
            True,
        )
    )
    return result


@pytest.mark.parametrize("kills", [KILLS])
def test_a_kill_at_any_moment_loses_no_data(server: CommandServer, prepared: Path, tmp_path: Path, kills: int) -> None:
    rng = random.Random(SEED)
    tried, lost = Counter[str](), Counter[str]()
    failures = []
    for task in tasks(server, prepared, tmp_path):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        task.reset()
        straight = task.run(fault=[str(task.changes.parent), NEVER, 0, False, str(calls)])
        assert straight.exit_code == 0, straight.output
        expected, count = task.result(), len(calls.read_text().splitlines())
        assert expected
        while tried[task.name] < max(1, round(kills * task.share)):
            task.reset()
            moments = []
            for _ in range(rng.randint(1, MAX_CONSECUTIVE_KILLS)):
                if task.at_call:
                    moment: dict[str, object] = {
                        "fault": [str(task.changes.parent), rng.randint(1, count), SIGKILL, False, ""]
                    }
                else:
                    moment = {"kill_after": rng.uniform(0, straight.seconds)}
                ended = task.run(**moment)
                moments.append(moment)
                tried[task.name] += ended.exit_code == KILLED
                if ended.exit_code not in (0, KILLED) and DONE not in ended.output:
                    failures.append(f"{task.name}, {moments}: {ended.output[-2000:]}")
            ended = task.run()
            if (
                (ended.exit_code != 0 and DONE not in ended.output)
                or task.result() != expected
                or leftovers(task.changes)
            ):
                lost[task.name] += 1
                failures.append(f"{task.name}, {moments}: exit code {ended.exit_code}\n{ended.output[-2000:]}")
        print(f"  {task.name:22} {tried[task.name]:4} kills, {lost[task.name]} lost", flush=True)
    total = sum(tried.values())
    print(f"{total} SIGKILLs tried, {total - sum(lost.values())} survived, {sum(lost.values())} lost (seed {SEED})")
    assert not failures, "\n".join(failures[:5])
