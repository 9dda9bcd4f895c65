"""A library that answers NVML calls in place of the driver's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.nvml import Scene

SOURCE = Path(__file__).parent / "nvml_stand_in.c"


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libnvidia-ml.so.1, built from nvml_stand_in.c."""
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler to build NVML's stand-in with")
    folder = tmp_path_factory.mktemp("nvml")
    command = [compiler, "-shared", "-fPIC", "-w", "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def scene(nvml_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Choose the machine that processes started afterwards see."""

    def play(name: str) -> None:
        monkeypatch.setenv("LD_LIBRARY_PATH", str(nvml_folder))
        monkeypatch.setenv("NVML_SCENE", name)

    return play
