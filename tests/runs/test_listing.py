"""`gpt2box runs`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.commands import Command
from tests.helpers.html_pages import Page, train_run
from tests.helpers.settings import options


def test_runs_are_listed_with_their_state(volumes: Path, gpt2box: Command) -> None:
    train_run(gpt2box, "done")
    command = [sys.executable, "-m", "gpt2box", "train", *options(name="going", max_steps=10**6, eval_interval=10**6)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr
        while "loss" not in (line := running.stderr.readline()):
            assert line, "it ended"
        while not (volumes / "runs/going/metrics.jsonl").read_text().count("\n") > 1:
            pass
        assert gpt2box("report", "going").returncode == 0
        found = {run["name"]: run for run in json.loads(gpt2box("runs", "--json").stdout)}
    finally:
        running.kill()
        running.wait()
        running.stderr.close()
    assert found["going"]["state"] == "training" and found["going"]["step"] > 0
    assert found["done"]["state"] == "finished" and found["done"]["step"] == 12
    assert found["done"]["tokens"] == 12 * json.loads((volumes / "runs/done/plan.json").read_text())["tokens_per_step"]
    assert "being trained" in Page(volumes / "runs/going/report.html").text
    assert json.loads(gpt2box("runs", "going", "--json").stdout)[0]["state"] == "stopped"
