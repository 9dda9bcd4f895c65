"""The report of a run: complete, self-contained and safe, also of a damaged run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from gpt2box.config import loader
from gpt2box.report.page import published_val_loss
from tests.helpers.commands import Command
from tests.helpers.html_pages import Page, train_run


def test_a_finished_run_has_a_report(volumes: Path, gpt2box: Command) -> None:
    done = train_run(gpt2box, "a", sample_tokens=20)
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


def test_samples_are_escaped_in_the_report(volumes: Path, gpt2box: Command) -> None:
    train_run(gpt2box, "a", sample_tokens=5)
    hostile = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\0"
    (volumes / "runs/a/samples/step-00000012.txt").write_text(hostile)
    assert gpt2box("report", "a").returncode == 0
    page = Page(volumes / "runs/a/report.html")
    assert page.addresses == [] and len(page.scripts) == 3 and "alert(1)" in page.text


def test_a_damaged_run_still_has_a_report(volumes: Path, gpt2box: Command) -> None:
    train_run(gpt2box, "a")
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, 1.59), ({"learning_rate": 0.1}, 1.59), ({"dataset": "mine"}, None), ({"max_steps": 9}, None)],
)
def test_a_published_val_loss_applies_to_the_same_text_and_network(
    changes: dict[str, object], said: float | None
) -> None:
    settings = loader.load_config("demo", {})[0].model_dump()
    assert published_val_loss({**settings, **changes}) == said
    assert published_val_loss({**settings, **changes, "expected_val_loss": 2.5}) == 2.5, "of a config of one's own"
