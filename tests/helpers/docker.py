"""Run Docker and create a project folder like a user's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    """Run a docker command and capture its output."""
    command = ["docker", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)  # type: ignore[call-overload, no-any-return]


@dataclass
class Project:
    """A user's checkout: Compose files, Makefile, configs, volumes."""

    folder: Path
    owner: int

    def config(self, name: str, **settings: object) -> None:
        """Write configs/NAME.yaml."""
        (self.folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump({**TINY, **settings}))

    def environment(self, **changes: str) -> dict[str, str]:
        """Return this process's environment with the project's owner as the user."""
        uid = str(self.owner)
        own = {"COMPOSE_PROJECT_NAME": self.folder.parent.name, "GPT2BOX_UID": uid, "GPT2BOX_GID": uid}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        return {**inherited, **own, **changes}

    def run(self, *command: str, **environment: str) -> Done:
        """Run a command in the project's folder."""
        everything = self.environment(**environment)
        return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=self.folder, env=everything)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command in the project's folder, in the background."""
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=self.folder, env=self.environment(), stdout=quiet, stderr=quiet)

    def compose(self, *arguments: str, **environment: str) -> Done:
        """Run docker compose with the CPU override."""
        return self.run("docker", "compose", "-f", "compose.yaml", "-f", "compose.cpu.yaml", *arguments, **environment)

    def path(self, *parts: str) -> Path:
        """Return a path in the project's volumes."""
        return self.folder.joinpath("volumes", *parts)


Run = Callable[..., Done]
