"""The comparison of runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.helpers.commands import Command
from tests.helpers.html_pages import Page, train_run


def test_a_comparison_has_differing_settings_and_curves_of_all_runs(
    volumes: Path, gpt2box: Command, tmp_path: Path
) -> None:
    train_run(gpt2box, "a")
    train_run(gpt2box, "b", learning_rate=1e-4, seed=5)
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
