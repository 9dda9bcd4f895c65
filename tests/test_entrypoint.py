"""The image's entrypoint, run as a script. tests/image runs it in containers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRYPOINT = ROOT / "entrypoint" / "entrypoint.sh"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH on which `python` is this interpreter, as it is in the image."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')  # a symlink would leave the virtual environment
    python.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), "/usr/bin", "/bin"])
    return {"PATH": path, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ENTRYPOINT, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "code", "output"),
    [
        ((), 0, "Usage: gpt2box [OPTIONS] COMMAND"),
        (("--version",), 0, "gpt2box, version"),
        (("sample", "--help"), 0, "Usage: gpt2box sample"),
        (("eval", "--help"), 0, "Usage: gpt2box eval"),  # also a builtin of the shell
        (("watch", "--help"), 0, "Usage: gpt2box watch"),  # also a program of procps
        (("sh", "-c", 'echo "$0 $1"', "a b", "c"), 0, "a b c\n"),
        (("smaple",), 2, "No such command 'smaple'"),
        (("nvidia-smi",), 3, "--gpus all"),
    ],
)
def test_entrypoint_runs_help_a_command_or_a_program(
    environment: dict[str, str], arguments: tuple[str, ...], code: int, output: str
) -> None:
    if arguments == ("nvidia-smi",) and shutil.which("nvidia-smi", path=environment["PATH"]):
        pytest.skip("nvidia-smi is installed")
    done = run(environment, *arguments)
    assert done.returncode == code and output in done.stdout + done.stderr, done.stderr


def test_entrypoint_passes_on_a_programs_exit_code_and_signal(environment: dict[str, str]) -> None:
    assert run(environment, "sh", "-c", "exit 7").returncode == 7
    assert run(environment, "sh", "-c", "kill -TERM $$").returncode == -signal.SIGTERM  # exec: no shell in between


@pytest.fixture
def run_with_volume(environment: dict[str, str], tmp_path: Path) -> Run:
    """Return a function that runs the entrypoint as uid 4321, with a file system mounted at the volumes' place."""
    if os.getuid() or not shutil.which("setpriv") or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("mounting a volume needs root")
    (tmp_path / "volumes").mkdir()
    stub = tmp_path / "bin" / "python"  # uid 4321 may be unable to read this interpreter
    stub.unlink()
    stub.write_text('#!/bin/sh\n[ "$1" != -c ] || exit 1\necho "ran: $*"\n')
    stub.chmod(0o755)
    root = Path(tempfile.gettempdir())
    for folder in (tmp_path, *(parent for parent in tmp_path.parents if root in parent.parents)):
        folder.chmod(0o755)
    script = shutil.copy(ENTRYPOINT, tmp_path / "entrypoint.sh")

    def run(mount_options: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        mount = 'mount -t tmpfs -o "$1" none "$GPT2BOX_VOLUMES"; shift; exec setpriv --reuid 4321 --regid 4321'
        command = ["unshare", "--mount", "sh", "-ec", f'{mount} --clear-groups "$@"', "sh", mount_options, script]
        own = {**environment, "GPT2BOX_VOLUMES": str(tmp_path / "volumes")}
        return subprocess.run([*command, *arguments], env=own, capture_output=True, text=True)

    return run


def test_entrypoint_refuses_a_volume_of_another_user(run_with_volume: Run) -> None:
    done = run_with_volume("mode=755,uid=77,gid=78", "prepare", "shakespeare")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == (
        "error: not writable: volumes\n"
        "  expected: write permission for uid 4321, or a read-only mount (:ro)\n"
        "  next: on the host: sudo chown -R 4321:4321 volumes; or start with --user 77:78, who owns it\n"
    )


@pytest.mark.parametrize(
    ("mount_options", "arguments"),
    [
        ("mode=755,uid=4321", "prepare shakespeare"),
        ("mode=755,ro", "prepare shakespeare"),
        ("mode=755", "sample"),  # reads only
        ("mode=755", "preflight"),  # reports on the volumes itself
        ("mode=755", "prepare --help"),
        ("mode=755", "--version"),
    ],
)
def test_entrypoint_leaves_other_volumes_and_commands_to_python(
    run_with_volume: Run, mount_options: str, arguments: str
) -> None:
    done = run_with_volume(mount_options, *arguments.split())
    assert (done.returncode, done.stdout) == (0, f"ran: -m gpt2box {arguments}\n"), done.stderr
