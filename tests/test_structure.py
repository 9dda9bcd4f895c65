"""The program's structure: imports point one way, modules stay readable, heavy imports stay lazy."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gpt2box"
# Each layer imports only from its own and those before it.
PACKAGES = """
    utils config system model data planner preflight runs distributed optim checkpoint inference evaluation report
    training export verify bench dashboard cli
"""
LAYERS = [["errors", "__init__"], *([package] for package in PACKAGES.split()), ["__main__"]]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((PACKAGE.parent / "tests").rglob("*.py"))


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "gpt2box"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imported(path):
        if module.startswith("gpt2box."):
            target = part_of(module)
            if target in RANK:
                assert RANK[target] <= RANK[part], f"{part} imports {module}"


@pytest.mark.parametrize(
    "module",
    ["gpt2box.config.schema", "gpt2box.planner.run_plan", "gpt2box.planner.report", "gpt2box.preflight.preflight"],
)
def test_settings_and_planning_never_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_module_imports_a_test_module(path: Path) -> None:
    """What several test modules share is in tests/helpers."""
    for module in imported(path):
        assert not any(part.startswith("test_") or part == "conftest" for part in module.split(".")), module


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, gpt2box.cli.main as c\n"
        "c.cli.main(['--help'], standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'numpy', 'pydantic', 'rich'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_image_has_what_brings_its_texts_when_it_does(tmp_path: Path) -> None:
    """Its stage for them copies a few modules alone, so that it is not built anew with each change of another."""
    stage = (PACKAGE.parent / "Dockerfile").read_text().partition("AS assets\n")[2].partition("\nFROM ")[0]
    copies = [line.split()[1:] for line in stage.splitlines() if line.startswith("COPY gpt2box/")]
    for *files, folder in copies:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(PACKAGE.parent / file, tmp_path / folder)
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import gpt2box.data.downloads"], cwd=tmp_path, capture_output=True
    )
    assert copies and done.returncode == 0
