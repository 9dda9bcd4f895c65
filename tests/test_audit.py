"""`make audit` and `make image-verify`: their reports and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNKNOWN_PACKAGE = {"name": "click", "skip_reason": "Dependency not found on PyPI and could not be audited: click (8)"}
ADVISORY = {"id": "PYSEC-2099-1", "fix_versions": ["9.0"]}


@pytest.mark.parametrize(
    ("answer", "code", "output"),
    [
        ({"dependencies": [{"name": "click", "version": "8", "vulns": []}]}, 0, "no known vulnerability"),
        (
            {"dependencies": [{"name": "click", "version": "8", "vulns": [ADVISORY]}]},
            1,
            "click 8: PYSEC-2099-1, fixed in 9.0",
        ),
        ({"dependencies": [UNKNOWN_PACKAGE]}, 75, "not audited: click"),
        ("connection refused", 75, "not audited: cpu.lock"),
    ],
)
def test_audit_does_not_pass_without_an_answer_of_the_advisory_service(
    tmp_path: Path, answer: object, code: int, output: str
) -> None:
    pip_audit = tmp_path / "pip-audit"  # prints what the real one prints
    pip_audit.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(answer)}\nEND\n")
    pip_audit.chmod(0o755)
    command = [sys.executable, ROOT / "scripts" / "audit.py", pip_audit, "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code and output in done.stdout, done.stdout + done.stderr
    assert "numpy" in done.stdout and "BSD-3-Clause" in done.stdout


def list_contents(tmp_path: Path, name: str, files: dict[str, bytes]) -> Path:
    """List the contents of an archive like an exported container; return the list's path."""
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    command = [sys.executable, ROOT / "scripts" / "image_contents.py", "list"]
    (tmp_path / name).write_bytes(
        subprocess.run(command, input=packed.getvalue(), capture_output=True, check=True).stdout
    )
    return tmp_path / name


@pytest.mark.parametrize(
    ("other", "code", "output"),
    [
        ({}, 0, "0 differ"),
        ({"opt/a\n.txt": b"2"}, 1, "UNEXPLAINED: 1\n  opt/a\\n.txt"),
        ({"etc/hostname": b"2"}, 0, "Docker creates it for each container: 1"),
        ({"opt/new": b""}, 1, "missing"),
    ],
)
def test_image_comparison_reports_differences(tmp_path: Path, other: dict[str, bytes], code: int, output: str) -> None:
    files = {"opt/a\n.txt": b"1", "etc/hostname": b"1", "opt/b": b"3"}
    lists = [list_contents(tmp_path, "1", files), list_contents(tmp_path, "2", files | other)]
    command = [sys.executable, ROOT / "scripts" / "image_contents.py", "compare", *lists]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code and output in done.stdout, done.stdout
