"""A project folder like a user's, with small models in configs/, and Docker's own command line.

The images come from run.sh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IMAGE = "gpt2box-test:cpu"
TINY = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 64,
    "device": "cuda",
    "micro_batch_size": 4,
    "tokens_per_step": 256,
    "max_steps": 30,
    "eval_interval": 10,
    "eval_windows": 4,
    "log_interval": 5,
}
Done = subprocess.CompletedProcess[str]


def docker(*arguments: object, **options: object) -> Done:
    """A docker command, with what it printed."""
    command = ["docker", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)  # type: ignore[call-overload, no-any-return]


@dataclass
class Project:
    """A checkout of a user's: compose files, Makefile, configs, volumes."""

    folder: Path
    owner: int

    def config(self, name: str, **settings: object) -> None:
        """Write configs/NAME.yaml."""
        (self.folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump({**TINY, **settings}))

    def environment(self, **changes: str) -> dict[str, str]:
        """This process's, as the project's owner."""
        uid = str(self.owner)
        own = {"COMPOSE_PROJECT_NAME": self.folder.parent.name, "GPT2BOX_UID": uid, "GPT2BOX_GID": uid}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        return {**inherited, **own, **changes}

    def run(self, *command: str, **environment: str) -> Done:
        """A command in the project's folder."""
        everything = self.environment(**environment)
        return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=self.folder, env=everything)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """The same, in the background."""
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=self.folder, env=self.environment(), stdout=quiet, stderr=quiet)

    def compose(self, *arguments: str, **environment: str) -> Done:
        """docker compose on the CPU override."""
        return self.run("docker", "compose", "-f", "compose.yaml", "-f", "compose.cpu.yaml", *arguments, **environment)

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath("volumes", *parts)


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


Run = Callable[..., Done]


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
