"""What ends a command, in exit codes and words; the commands that it suggests."""

from __future__ import annotations

import errno
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from gpt2box import is_cpu_busy
from gpt2box.cli.main import cli
from gpt2box.errors import BadInput, MachineCannot, VolumeUnwritable
from gpt2box.system import os_errors
from gpt2box.utils.progress import gpt2box_command
from tests.helpers.commands import Command
from tests.helpers.training import process, wait_for


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("ENOSPC", VolumeUnwritable),
        ("EFBIG", VolumeUnwritable),
        ("EACCES", VolumeUnwritable),
        ("EIO", VolumeUnwritable),
        ("EMFILE", MachineCannot),
        ("ENFILE", MachineCannot),
        ("EAGAIN", MachineCannot),
        ("EISDIR", BadInput),
        ("EBADF", type(None)),
    ],
)
def test_what_the_system_refuses_is_said_in_words(code: str, kind: type) -> None:
    number = getattr(errno, code)
    fault = os_errors.explain_os_error(OSError(number, os.strerror(number), "/some/file"))
    assert type(fault) is kind and (fault is None or "/some/file" in fault.found)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
    ids=["PyTorch's own", "CUDA's own", "a broken card", "a bug"],
)
def test_a_card_that_is_full_is_said_in_words(error: RuntimeError, full: bool) -> None:
    import gpt2box.system.device  # noqa: F401, as whatever uses a card has it loaded

    fault = os_errors.explain_cuda_oom(error)
    assert bool(fault) == full and (fault is None or (fault.exit_code == 3 and "--device cpu" in fault.next_step))


def test_memory_that_runs_out_while_the_program_is_loaded_is_said_in_words(started: Command) -> None:
    done = started("train", "demo", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20)))
    assert done.returncode == 3 and "memory ran out" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("program", "on_path", "said"),
    [
        (".venv/bin/gpt2box", False, ".venv/bin/gpt2box sample 'my run'"),
        ("BIN/gpt2box", True, "gpt2box sample 'my run'"),
        ("/usr/lib/python3/site-packages/gpt2box/__main__.py", False, "python -m gpt2box sample 'my run'"),
        ("gpt2box", False, "gpt2box sample 'my run'"),
    ],
)
def test_a_command_is_suggested_as_it_was_called(
    program: str, on_path: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2box").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if on_path else "/nowhere")
    monkeypatch.setattr("sys.argv", [program.replace("BIN", str(tmp_path)), "train"])
    assert gpt2box_command("sample", "my run") == said


def test_a_stopped_training_says_the_whole_command(volumes: Path) -> None:
    """With all its options, to be pasted."""
    running = process(volumes, name="run", max_steps=1000, log_interval=1)
    wait_for(volumes / "runs/run/checkpoints/last", running)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    pasted = errors.rpartition("the same command again: ")[2].strip()
    assert shlex.split(pasted) == ["python", "-m", "gpt2box", *running.args[3:]], errors  # type: ignore[index]


def test_help_says_each_command_whole_in_80_columns() -> None:
    names = [(), *((name,) for name in cli.commands)]
    pages = {name: CliRunner().invoke(cli, [*name, "--help"], terminal_width=80).output for name in names}
    assert "..." not in pages[()].partition("Commands:")[2]
    long = [line for page in pages.values() for line in page.splitlines() if len(line) > 80]
    assert long == [] and "Help:" not in "".join(pages.values()) and "q8_0" in pages[("export",)]


def test_other_work_on_the_cores_is_noticed_or_not_but_asked_for_in_vain_never() -> None:
    assert is_cpu_busy() in (True, False)
    code = "import os, gpt2box; print(os.environ['OMP_WAIT_POLICY'])"
    environment = os.environ | {"OMP_WAIT_POLICY": "ACTIVE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "ACTIVE\n", "whoever sets it has it"
