"""Heavy imports stay lazy and tests stay independent. The layers are held by import-linter (pyproject.toml)."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gpt2box"
TESTS = sorted((PACKAGE.parent / "tests").rglob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "gpt2box"}
    return found


@pytest.mark.parametrize(
    "module",
    ["gpt2box.config.schema", "gpt2box.planner.run_plan", "gpt2box.planner.report", "gpt2box.preflight.preflight"],
)
def test_settings_and_planning_never_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_module_imports_a_test_module(path: Path) -> None:
    """Code shared by test modules belongs in tests/helpers."""
    for module in imported(path):
        assert not any(part.startswith("test_") or part == "conftest" for part in module.split(".")), module


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, gpt2box.cli.main as c\n"
        "c.cli.main(['--help'], standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'numpy', 'pydantic', 'rich'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_image_stage_for_assets_copies_every_module_it_imports(tmp_path: Path) -> None:
    """The stage copies few modules, so that a change of another module does not rebuild it."""
    stage = (PACKAGE.parent / "Dockerfile").read_text().partition("AS assets\n")[2].partition("\nFROM ")[0]
    copies = [line.split()[1:] for line in stage.splitlines() if line.startswith("COPY gpt2box/")]
    for *files, folder in copies:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(PACKAGE.parent / file, tmp_path / folder)
    statement = stage.partition('RUN python -c "')[2].partition(";")[0]
    assert copies and statement.startswith("from gpt2box.")
    command = [sys.executable, "-S", "-c", statement]
    assert subprocess.run(command, cwd=tmp_path, env={}, capture_output=True).returncode == 0
