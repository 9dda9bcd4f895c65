"""A server of processes that can be killed, and a disk that can fail."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.disk_faults import Server

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler to build a failing disk with")
    folder = tmp_path_factory.mktemp("faults")
    shim = folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(shim), str(HERE / "faults.c"), "-ldl"], check=True)
    found = Server(folder, shim)
    yield found
    assert found.process.stdin is not None
    found.process.stdin.close()
    found.process.wait()
