"""Send Ctrl-C and SIGTERM to a real process in each phase except the training itself (see test_train.py)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2box.utils.signals import BEFORE, UNSAVED
from tests.helpers.settings import TINYSHAKESPEARE
from tests.helpers.training import process, wait_for

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
Running = subprocess.Popen[str]


def ended(running: Running, number: signal.Signals) -> str:
    """Send a signal before training starts; return the lines that were printed before it."""
    running.send_signal(number)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 128 + number, (running.returncode, errors)
    said, _, last = errors.removesuffix("\n").rpartition("\n")
    assert last == f"{number.name}: {BEFORE}", errors
    return said


def until(there: Callable[[], object], running: Running) -> None:
    while not there():
        assert running.poll() is None, running.stderr and running.stderr.read()
        time.sleep(0.005)


def maps_torch(running: Running) -> bool:
    """Return True once the process has begun to load PyTorch."""
    return "libtorch" in Path(f"/proc/{running.pid}/maps").read_text()


def children(running: Running) -> list[str]:
    return Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()


@BOTH
def test_while_the_program_is_loaded(volumes: Path, number: signal.Signals) -> None:
    running = process(volumes, name="run")
    until(lambda: maps_torch(running), running)
    assert ended(running, number) == "" and not (volumes / "runs").exists()


INTERRUPTED = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

import gpt2box.__main__ as program
sys.meta_path.insert(0, Interrupt())
program.main()
"""


@pytest.mark.parametrize("module", ["gpt2box.cli.main", "click", "gpt2box.utils.ranks"])
def test_while_the_commands_are_loaded(module: str) -> None:
    run = subprocess.run([sys.executable, "-c", INTERRUPTED, module], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")


def test_what_a_shell_started_to_ignore_it_goes_on() -> None:
    ignores = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + INTERRUPTED
    command = [sys.executable, "-c", ignores, "click", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "click" in run.stderr, run.stderr  # it went on to its arguments


@BOTH
def test_while_data_are_prepared_by_processes_of_their_own(
    volumes: Path, tmp_path: Path, number: signal.Signals
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    plain = TINYSHAKESPEARE.read_text()
    for index in range(70):  # more than is read whole
        (texts / f"{index:02d}.txt").write_text(f"{index}\n{plain}")
    settings = {"name": "run", "dataset": texts, "max_steps": 2, "device": "cpu"}
    running = process(volumes, **settings)
    until(lambda: any(path.stat().st_size for path in (volumes / "data").glob(".texts.*.tmp/train.bin")), running)
    workers = children(running)
    assert workers
    said = ended(running, number)
    assert "takes about" in said and "leaked" not in said and "Traceback" not in said, said
    until_gone(workers)
    assert not (volumes / "data/texts").exists() and not (volumes / "runs").exists()
    again = process(volumes, **settings)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0 and "run: finished at step 2" in errors, errors


def until_gone(workers: list[str]) -> None:
    end = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


SLOW = """
import time
from gpt2box.cli import main
from gpt2box.training import run

write_run_records = run.write_run_records

def slowly(*given):
    write_run_records(*given)
    time.sleep(100)

run.write_run_records = slowly
main.main()
"""


@BOTH
def test_when_the_network_is_made(volumes: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = volumes / "runs/run"
    (tmp_path / "program.py").write_text(SLOW)
    running = process(volumes, str(tmp_path / "program.py"), name="run", max_steps=2)
    wait_for(run / "manifest.json", running)
    assert "parameters, from scratch" in ended(running, number)
    assert BEFORE in (run / "log.txt").read_text()
    again = process(volumes, name="run", max_steps=2)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0 and "finished at step 2" in errors, errors


@BOTH
def test_a_second_signal_ends_a_long_step_and_says_what_that_costs(volumes: Path, number: signal.Signals) -> None:
    running = process(volumes, name="run", tokens_per_step=32 * 4 * 100_000, eval_interval=1000)
    wait_for(volumes / "runs/run/tensorboard", running)
    assert running.stderr
    until_said(running, "val_loss")
    running.send_signal(number)
    until_said(running, "finishing this step")
    running.send_signal(number)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 128 + number and errors == f"{number.name}: {UNSAVED}\n"


def until_said(running: Running, words: str) -> None:
    assert running.stderr
    said = ""
    while words not in said:
        line = running.stderr.readline()
        assert line, said
        said += line


OF_ALL_RANKS = """
import os, signal
from gpt2box.utils.signals import StopRequest
stop = StopRequest().install()
with stop.awaited():
    stop.name = "a signal to another rank"
    os.kill(os.getpid(), signal.SIGTERM)
    print("saves", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_ranks_own_first_signal_after_anothers_is_no_second_one() -> None:
    done = subprocess.run([sys.executable, "-c", OF_ALL_RANKS], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("saves\n", 128 + signal.SIGTERM)
    assert done.stderr.count("finishing this step") == 1 and done.stderr.endswith(f"SIGTERM: {UNSAVED}\n")


HUNG_UP = """
import os, signal, sys
from gpt2box.utils.signals import StopRequest
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
stop = StopRequest().install()
with stop.awaited():
    for name in sys.argv[2:]:
        os.kill(os.getpid(), getattr(signal, name))
    print(stop.name)
"""


@pytest.mark.parametrize(
    ("before", "signals", "code", "name"),
    [
        ("SIG_DFL", ["SIGHUP"] * 3, 0, "SIGHUP"),
        ("SIG_DFL", ["SIGHUP", "SIGTERM", "SIGHUP"], 0, "SIGHUP"),
        ("SIG_DFL", ["SIGTERM", "SIGHUP"], 0, "SIGTERM"),
        ("SIG_DFL", ["SIGHUP", "SIGTERM", "SIGTERM"], 128 + signal.SIGTERM, ""),
        ("SIG_IGN", ["SIGHUP"], 0, ""),
    ],
    ids=["several", "of a session's end", "after SIGTERM", "then in earnest", "nohup"],
)
def test_a_closed_terminal_asks_once(before: str, signals: list[str], code: int, name: str) -> None:
    done = subprocess.run([sys.executable, "-c", HUNG_UP, before, *signals], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (code, name), done.stderr


def test_nobody_need_listen_to_a_training(volumes: Path) -> None:
    """`train 2>&1 | head -1`."""
    running = process(volumes, name="run", max_steps=6, log_interval=1)
    assert running.stderr and running.stdout
    assert running.stderr.readline()
    running.stderr.close()
    running.stdout.close()
    assert running.wait(timeout=120) == 0
    assert "run: finished at step 6" in (volumes / "runs/run/log.txt").read_text()


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>&- >&- <&-"])
def test_an_error_that_nobody_can_read_has_its_exit_code(where: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m gpt2box runs nosuch {where}"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path).returncode == 2


def test_a_result_that_nobody_reads_ends_the_command(tmp_path: Path) -> None:
    command = f"{sys.executable} -m gpt2box plan shakespeare --gpu rtx-4070"
    running = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    assert running.stdout and running.stderr
    running.stdout.close()
    assert running.wait(timeout=60) == 141 and running.stderr.read() == b""
