"""Runs on a page and in a list, of real trainings and of broken ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gpt2box.config import loader
from gpt2box.report.page import published_val_loss
from gpt2box.runs.history import read_history
from gpt2box.runs.view import training_seconds_after
from tests.helpers.commands import Command
from tests.helpers.settings import options


class Page(HTMLParser):
    """What a browser would load, run and show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.inside: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.inside, "every element ends"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [str(value) for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "br"):
            self.inside.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] == "script":
            self.scripts[-1] += data
        elif self.inside and self.inside[-1] != "style":
            self.text += data

    @property
    def charts(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """The lines of each chart by name."""
        found = next(json.loads(script) for script in self.scripts if script.startswith("["))
        return {chart["title"].split(":")[0]: {line["label"]: line for line in chart["lines"]} for chart in found}


def train(gpt2box: Command, name: str, **changes: object) -> subprocess.CompletedProcess[str]:
    done = gpt2box("train", *options(name=name, max_steps=12, eval_interval=4, log_interval=1, **changes))
    assert done.returncode == 0, done.stderr
    return done


def test_a_finished_run_has_its_report(volumes: Path, gpt2box: Command) -> None:
    done = train(gpt2box, "a", sample_tokens=20)
    run = volumes / "runs" / "a"
    assert str(run / "report.html") in done.stderr
    page = Page(run / "report.html")
    assert page.addresses == [] and "default-src 'none'" in page.source, "nothing is loaded from anywhere"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = page.charts["Loss"]
    assert loss["train"]["value"] == pytest.approx([row["loss"] for row in rows if row["kind"] == "train"], rel=1e-5)
    assert loss["validation"]["step"] == [0, 4, 8, 12]
    best = min(row["val_loss"] for row in rows if row["kind"] == "eval")
    for part in ("finished", "12 of 12", f"{best:.4f} at step", "tinyshakespeare", "gpt2box sample a", "step 8"):
        assert part in page.text, part
    assert "gguf" not in page.text, "it is in characters"


def test_what_a_text_holds_is_never_a_browsers_business(volumes: Path, gpt2box: Command) -> None:
    train(gpt2box, "a", sample_tokens=5)
    hostile = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\0"
    (volumes / "runs/a/samples/step-00000012.txt").write_text(hostile)
    assert gpt2box("report", "a").returncode == 0
    page = Page(volumes / "runs/a/report.html")
    assert page.addresses == [] and len(page.scripts) == 3 and "alert(1)" in page.text


def test_a_run_that_was_broken_off_still_opens(volumes: Path, gpt2box: Command) -> None:
    train(gpt2box, "a")
    run = volumes / "runs/a"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "kind": "train", "loss": null, "time": 1}\n[]\n\n{"step": 14, "kin')
    (run / "plan.json").write_text('{"shape": 3')
    (run / "manifest.json").write_bytes(b"\xff\x00")
    for checkpoint in (run / "checkpoints").glob("step-*"):
        os.truncate(checkpoint / "model.safetensors", 100)
    done = gpt2box("report")
    assert done.returncode == 0 and done.stdout.strip() == str(run / "report.html")
    page = Page(run / "report.html")
    assert "Damaged: " in page.text and page.charts["Loss"]["train"]["step"][-1] == 12
    listed = gpt2box("runs")
    assert "damaged" in listed.stdout and str(run / "plan.json") in listed.stdout
    shutil.rmtree(run)
    assert "no run in" in gpt2box("runs").stdout
    for command in (["report"], ["report", "a"], ["runs", "../a"], ["runs", "--compare", "a"]):
        refused = gpt2box(*command)
        assert refused.returncode == 2 and "next: " in refused.stderr, refused.stderr


def test_runs_are_listed_as_they_are(volumes: Path, gpt2box: Command) -> None:
    train(gpt2box, "done")
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


def test_runs_side_by_side(volumes: Path, gpt2box: Command, tmp_path: Path) -> None:
    train(gpt2box, "a")
    train(gpt2box, "b", learning_rate=1e-4, seed=5)
    done = gpt2box("runs", "--compare", "a", "b", "--json", "--out", str(tmp_path / "page.html"))
    assert done.returncode == 0, done.stderr
    compared = json.loads(done.stdout)
    assert {key: values["b"] for key, values in compared["settings"].items()} == {
        "learning_rate": "0.0001",
        "seed": "5",
    }
    page = Page(tmp_path / "page.html")
    assert page.addresses == [] and set(page.charts["Training loss, nats a token"]) == {"a", "b"}
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for out in (str(tmp_path / "pipe"), str(tmp_path / "link"), ""):
        refused = gpt2box("runs", "--compare", "a", "b", "--out", out)
        assert refused.returncode == 2 and "is not a file" in refused.stderr, refused.stderr
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


def test_no_peak_of_a_long_run_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as file:
        for step in range(1, 50_001):
            loss = 99.0 if step == 31_234 else -5.0 if step == 40_321 else 3.0
            file.write(json.dumps({"step": step, "kind": "train", "time": step, "loss": loss}) + "\n")
    curve = read_history(path).curves["loss"]
    thin = curve.downsampled(2000)
    assert len(curve.step) == 50_000 and len(thin.step) <= 2002
    assert (thin.step[0], thin.step[-1]) == (1, 50_000)
    assert {31_234.0, 40_321.0} <= set(thin.step.tolist()) and np.all(np.diff(thin.step) > 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, 1.59), ({"learning_rate": 0.1}, 1.59), ({"dataset": "mine"}, None), ({"max_steps": 9}, None)],
)
def test_what_was_published_is_said_of_the_same_text_and_network(
    changes: dict[str, object], said: float | None
) -> None:
    settings = loader.load_config("demo", {})[0].model_dump()
    assert published_val_loss({**settings, **changes}) == said
    assert published_val_loss({**settings, **changes, "expected_val_loss": 2.5}) == 2.5, "of a config of one's own"


def test_the_time_of_a_run_that_is_trained_now_is_counted_past_its_checkpoint() -> None:
    rows = [{"kind": "train", "step": step, "tokens_per_sec": 50.0} for step in (10, 20, 30)]
    assert training_seconds_after(rows, 10, 100) == 40 and training_seconds_after(rows, 30, 100) == 0
    assert training_seconds_after([{"kind": "train", "step": 40, "tokens_per_sec": None}], 30, 100) == 0


def test_a_backend_of_matplotlib_that_is_none_ends_nothing(started: Command, volumes: Path) -> None:
    command = ["train", *options(name="a", max_steps=1, eval_interval=1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "nonsense")
        done = started(*command)
    assert done.returncode == 0 and (volumes / "runs/a/loss.png").exists(), done.stderr
