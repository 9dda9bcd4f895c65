"""The README and the docs match the program: commands, settings, make tasks, links, named files."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml

from gpt2box.cli.main import cli
from gpt2box.config import loader, schema

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = [page for page in PAGES if page.parent.name != "reference"]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SOURCE_PATH = re.compile(r"(?:gpt2box|docs|configs|scripts|examples|tests|benchmarks|requirements)/[\w./-]*")


def _page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _command_lines(page: Path) -> Iterator[str]:
    """Yield each `gpt2box ...` command line of a page, from its code blocks and its inline code."""
    text = page.read_text()
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += INLINE.findall(FENCE.sub("", text))
    for line in lines:
        match = re.match(r"(?:\S+=\S+ |[a-z]+ [^|]*\| )*((?:torchrun .*-m )?gpt2box [a-z].*)", line.strip())
        if match:
            yield re.sub(r"^torchrun .*-m ", "", match[1])


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "scripts" / "generate_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", GUIDES, ids=_page_id)
def test_every_command_line_in_the_docs_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))
    monkeypatch.setattr(click.File, "convert", lambda self, value, param, ctx: value)
    parent = click.Context(cli, **cli.context_settings)
    for line in _command_lines(page):
        name, *arguments = [word for word in shlex.split(line, comments=True)[1:] if word != "…"]
        assert name in cli.commands, f"{line}: no such command"
        if not arguments and "…" not in line:
            continue  # the command's name alone, mentioned in a sentence
        try:
            values = cli.commands[name].make_context(name, arguments, parent=parent).params
        except click.exceptions.Exit:
            continue  # --help
        except click.UsageError as error:
            pytest.fail(f"{line}: {error.format_message()}")
        settings: dict[str, Any] = {key: values[key] for key in schema.Config.model_fields if values.get(key)}
        if name in ("train", "plan", "bench", "fetch", "preflight"):
            schema.Config.model_validate(settings)


def test_every_command_has_help_and_is_in_the_readme() -> None:
    for name, command in cli.commands.items():
        assert command.help and f"gpt2box {name}" in README.read_text()


@pytest.mark.parametrize("file_name", ["settings.md", "commands.md"])
def test_the_generated_reference_is_current(file_name: str) -> None:
    written = (ROOT / "docs" / "reference" / file_name).read_text()
    assert written == _generator().PAGES[file_name](), "python scripts/generate_reference.py writes it anew"


def test_every_make_task_in_the_docs_exists_and_make_alone_lists_it() -> None:
    listed = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    for page in PAGES:
        text = page.read_text()
        for line in [line for block in FENCE.findall(text) for line in block.splitlines()] + INLINE.findall(text):
            if match := re.match(r"(?:\S+=\S+ )*make ([a-z-]+)", line):
                assert f"make {match[1]} " in listed, f"{page.name}: {line}"


def test_every_compose_service_in_the_docs_exists() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    profiles = {profile for service in services.values() for profile in service["profiles"]}
    for page in PAGES:
        text = page.read_text()
        assert set(re.findall(r"docker compose .*?--profile ([a-z-]+)", text)) <= profiles, page.name
        assert set(re.findall(r"docker compose run --rm ([a-z-]+)", text)) <= services.keys(), page.name


def test_the_readme_promises_the_demos_own_loss() -> None:
    expected = yaml.safe_load((loader.PRESETS_DIR / "demo.yaml").read_text())["expected_val_loss"]
    assert f"**{expected}**" in README.read_text()


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_every_relative_link_and_anchor_resolves(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("page", GUIDES, ids=_page_id)
def test_every_source_file_that_a_page_names_exists(page: Path) -> None:
    for code in INLINE.findall(FENCE.sub("", page.read_text())):
        if SOURCE_PATH.fullmatch(code):
            assert (ROOT / code).exists(), code


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in LINK.findall(index.read_text()) if ":" not in link}
    assert {page.resolve() for page in PAGES if page not in (README, index)} <= linked


def test_the_architecture_page_lists_every_package() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(path.parent.name for path in (ROOT / "gpt2box").glob("*/__init__.py"))


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_lines_are_at_most_100_columns(page: Path) -> None:
    for line in FENCE.sub("", page.read_text()).splitlines():
        assert len(line) <= 100 or line.startswith("|"), line
