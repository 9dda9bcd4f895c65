"""The dashboard's answers follow runs that grow, restart, are damaged and disappear."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from gpt2box.dashboard.state import ClientState, DashboardState
from gpt2box.utils.files import file_lock, write_atomically
from tests.helpers.run_folders import make_run_folder, train_line


def steps(answer: dict[str, Any]) -> list[int]:
    return answer["run"]["curves"]["charts"][0]["lines"][0]["step"]  # type: ignore[no-any-return]


def test_a_poll_returns_only_news_and_everything_after_the_file_is_replaced(runs: Path) -> None:
    watch = DashboardState()
    assert watch.updates(ClientState()) == {"runs": [], "cards": watch.read_gpus(), "run": None}
    folder = make_run_folder(runs, "a", 3)
    first = watch.updates(ClientState())["run"]
    assert first["curves"]["whole"] and steps({"run": first}) == [1, 2, 3] and "it began" in first["log"]["text"]
    known = ClientState(
        curves=first["curves"]["version"], log=first["log"]["version"], samples=first["samples"]["version"]
    )
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(train_line(4) + train_line(5)[:20])
        file.flush()
        (folder / "samples/step-00000004.txt").write_text("To be\n")
        second = watch.updates(known)["run"]
        assert not second["curves"]["whole"] and steps({"run": second}) == [4], "not the line that is being written"
        assert second["log"] is None and second["samples"]["text"] == "To be\n"
        known = ClientState(curves=second["curves"]["version"])
        file.write(train_line(5)[20:])
    assert steps(watch.updates(known)) == [5]
    write_atomically(folder / "metrics.jsonl", train_line(1) + train_line(2))  # as a run that goes on from step 2 does
    again = watch.updates(known)
    assert again["run"]["curves"]["whole"] and steps(again) == [1, 2]
    shutil.rmtree(folder)
    assert watch.updates(ClientState(run="a"))["run"] is None and watch.updates(known)["runs"] == []


def test_the_run_in_training_comes_first_and_a_damaged_run_is_shown(runs: Path) -> None:
    for name in ("old", "going", "torn"):
        make_run_folder(runs, name, 2)
    (runs / "torn/plan.json").write_text('{"max_st')
    (runs / "torn/metrics.jsonl").write_bytes(
        b'{"step": 1, "kind": "train", "lo\n\xff\0\n[]\n' + train_line(7).encode()
    )
    (runs / "torn/samples/step-00000007.txt").write_bytes(b"\xff</script>")
    watch = DashboardState()
    with file_lock(runs / "going/.lock", "it"):
        answer = watch.updates(ClientState())
        assert (
            answer["run"]["name"] == answer["runs"][0]["name"] == "going" and answer["runs"][0]["state"] == "training"
        )
        figures = dict(answer["run"]["figures"])
    assert figures["step"] == "2 of 100,000" and figures["loss"] == "3.9980" and figures["time left"] == "21m 20s"
    assert "ago" in figures["last figure"], "it was long ago"
    assert {run["name"]: run["state"] for run in watch.updates(ClientState())["runs"]}["going"] == "stopped"
    torn = watch.updates(ClientState(run="torn"))
    assert torn["run"]["state"] == "damaged" and steps(torn) == [7] and "</script>" in torn["run"]["samples"]["text"]
    assert watch.updates(ClientState(run="../old"))["run"] is None
