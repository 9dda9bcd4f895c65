"""A project folder like a user's, with small models in configs/, and Docker's own command line.

The images come from run.sh.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.docker import IMAGE, ROOT, Done, Project, Run, docker


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """A fresh project of a user with uid 1234; its containers are removed afterwards."""
    folder = tmp_path / f"gpt2box-test-{uuid.uuid4().hex[:8]}" / "gpt2box"
    folder.mkdir(parents=True)
    for name in ("compose.yaml", "compose.cpu.yaml", "Makefile", "Dockerfile"):
        shutil.copy(ROOT / name, folder)
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "gpt2box").mkdir()
    shutil.copy(ROOT / "gpt2box" / "__init__.py", folder / "gpt2box")
    (folder / "configs").mkdir()
    for part in tmp_path.parents[0], tmp_path.parents[1], tmp_path:
        part.chmod(0o755)  # pytest's own are for one user only; Docker's containers belong to another
    made = Project(folder, 1234)
    for name in ("data", "models", "runs"):
        made.path(name).mkdir(parents=True)
        os.chown(made.path(name), 1234, 1234)
    yield made
    profiles = [
        word
        for p in ("shakespeare", "openwebtext", "finetune", "cpu-demo", "multi-gpu", "tensorboard", "dashboard")
        for word in ("--profile", p)
    ]
    made.compose(*profiles, "down", "--volumes", "--timeout", "1")


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Run]:
    """docker run of the CPU image, with a volume owned by uid 4321."""
    volumes = tmp_path / "volumes"
    volumes.mkdir()
    os.chown(volumes, 4321, 4321)
    for part in (tmp_path.parents[0], tmp_path.parents[1], tmp_path):
        part.chmod(0o755)
    name = f"gpt2box-test-{uuid.uuid4().hex[:8]}"

    def run(*arguments: str, options: tuple[str, ...] = (), image: str = IMAGE, mount: bool = True) -> Done:
        mounts = ["-v", f"{volumes}:/volumes", "--user", "4321:4321"] if mount else []
        return docker("run", "--name", name, "--rm", *mounts, *options, image, *arguments)

    yield run
    docker("rm", "-f", name)
