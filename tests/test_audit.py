"""What `make audit` and `make image-verify` say of what they are given."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_KNOWN = {"name": "click", "skip_reason": "Dependency not found on PyPI and could not be audited: click (8)"}
FAULT = {"id": "PYSEC-2099-1", "fix_versions": ["9.0"]}


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ({"dependencies": [{"name": "click", "version": "8", "vulns": []}]}, 0, "no known vulnerability"),
        (
            {"dependencies": [{"name": "click", "version": "8", "vulns": [FAULT]}]},
            1,
            "click 8: PYSEC-2099-1, mended in 9.0",
        ),
        ({"dependencies": [NOT_KNOWN]}, 75, "not audited, so nothing is known: click"),
        ("connection refused", 75, "not audited, so nothing is known: cpu.lock"),
    ],
)
def test_no_answer_of_the_advisory_service_is_not_taken_for_a_good_one(
    tmp_path: Path, answer: object, code: int, said: str
) -> None:
    answering = tmp_path / "pip-audit"  # what the real one prints
    answering.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(answer)}\nEND\n")
    answering.chmod(0o755)
    command = [sys.executable, ROOT / "requirements" / "audit.py", answering, "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout, done.stdout + done.stderr
    assert "numpy" in done.stdout and "BSD-3-Clause" in done.stdout


def contents(tmp_path: Path, name: str, files: dict[str, bytes]) -> Path:
    """The list of an archive's contents, as of an exported container."""
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
    ("other", "code", "said"),
    [
        ({}, 0, "0 differ"),
        ({"opt/a\n.txt": b"2"}, 1, "WITHOUT A KNOWN REASON: 1\n  opt/a\\n.txt"),
        ({"etc/hostname": b"2"}, 0, "made by Docker for each container: 1"),
        ({"opt/new": b""}, 1, "missing"),
    ],
)
def test_two_images_are_compared_file_by_file(tmp_path: Path, other: dict[str, bytes], code: int, said: str) -> None:
    files = {"opt/a\n.txt": b"1", "etc/hostname": b"1", "opt/b": b"3"}
    lists = [contents(tmp_path, "1", files), contents(tmp_path, "2", files | other)]
    command = [sys.executable, ROOT / "scripts" / "image_contents.py", "compare", *lists]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout, done.stdout
