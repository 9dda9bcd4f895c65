"""Train tiny runs, and read their HTML pages as a browser would."""

from __future__ import annotations

import json
import subprocess
from html.parser import HTMLParser
from pathlib import Path

from tests.helpers.commands import Command
from tests.helpers.settings import options


class Page(HTMLParser):
    """Parse an HTML file: the addresses it loads, its scripts and its visible text."""

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
        """Return the lines of each chart by name."""
        found = next(json.loads(script) for script in self.scripts if script.startswith("["))
        return {chart["title"].split(":")[0]: {line["label"]: line for line in chart["lines"]} for chart in found}


def train_run(gpt2box: Command, name: str, **changes: object) -> subprocess.CompletedProcess[str]:
    """Train a tiny run for 12 steps."""
    done = gpt2box("train", *options(name=name, max_steps=12, eval_interval=4, log_interval=1, **changes))
    assert done.returncode == 0, done.stderr
    return done
