"""What the docs say of commands and settings is what the program has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from gpt2box.cli.main import cli
from gpt2box.config import loader

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_command_in_the_docs_exists() -> None:
    for path in TEXTS:
        for command in re.findall(r"gpt2box (prepare|train|sample|[a-z]+) (?=[a-z\[A-Z`]|-)", path.read_text()):
            assert command in cli.commands, f"{path.name}: gpt2box {command}"


def test_every_command_has_help_and_is_in_the_readme() -> None:
    for name, command in cli.commands.items():
        assert command.help and f"gpt2box {name}" in TEXTS[0].read_text()


def test_every_make_task_in_the_docs_exists_and_make_alone_lists_it() -> None:
    listed = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    for path in TEXTS:
        for task in re.findall(r"`make ([a-z-]+)`", path.read_text()):
            assert f"make {task} " in listed, f"{path.name}: make {task}"


def test_the_readme_promises_the_demos_own_loss() -> None:
    expected = yaml.safe_load((loader.SHIPPED / "demo.yaml").read_text())["expected_val_loss"]
    assert f"**{expected}**" in TEXTS[0].read_text()
