"""What training shows: a panel on a terminal, lines in a log, JSON for programs."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2box.config import loader
from gpt2box.model.shape import ModelShape
from gpt2box.planner.run_plan import RunPlan, make_run_plan
from gpt2box.planner.search import list_execution_plans
from gpt2box.planner.target_device import TargetDevice
from gpt2box.training.console import Display
from tests.helpers.commands import Command
from tests.helpers.settings import options as tiny


def plan(**flags: str) -> RunPlan:
    config = loader.load_config(None, {"dataset": "x", **flags})[0]
    shape = ModelShape(24, 16, 1024, 1024, 50_257)
    way = list_execution_plans(config, shape, TargetDevice("a card", 0, None, "bfloat16", on_gpu=True, compiled=False))[
        0
    ]
    return make_run_plan(config, shape, 10**6, "cpu", "bfloat16", way, peak_tflops=58.3)


ROW = {
    "loss": 3.0, "learning_rate": 3e-4, "grad_norm": 0.5, "tokens_per_sec": 10_000.0, "peak_memory_bytes": 2**33,
    "skipped_steps": 0, "mfu": 0.4,
}  # fmt: skip


def test_on_a_terminal_there_is_a_panel(volumes: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "gpt2box",
        "train",
        *tiny(name="a", max_steps=30, eval_interval=10, log_interval=1),
    ]
    command += ["--sample-tokens=20"]
    ours, theirs = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "LINES": "40", "TERM": "xterm"}
    running = subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert running.communicate()[0] == b"" and running.returncode == 0
    text = seen.decode()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text[text.rindex("╭") : text.rindex("╰")])
    for part in ("30 of 30", "▁", "tokens/s", "at step 30", "learning rate", "sample"):
        assert part in last, last
    assert all(len(line.rstrip()) <= 80 for line in last.splitlines())
    assert text.rindex("\x1b[?25h") > text.rindex("╭"), "the cursor is there again"
    assert "finished at step 30" in text.split("╰")[-1] and "step 30/30  val_loss" in text
    log = (volumes / "runs/a/log.txt").read_text()
    for part in ("a: 2 layers", "step 30/30  loss", "step 30/30  val_loss", "finished at step 30"):
        assert part in log, "the log is kept, whatever the terminal shows"


ASIDE = """
import os, sys, warnings
from pathlib import Path
from gpt2box.utils.progress import run_log_file
from tests.training.test_console import ROW, Display, plan
with run_log_file(Path(sys.argv[1])):
    display = Display("a", 0, plan())
    warnings.warn("of Python")
    os.write(2, b"[W of C++]\\n")
    for step in range(1, 4):
        display.show_train_row(step, ROW, 9)
    display.close()
try:
    with run_log_file(Path(sys.argv[1])):
        Display("a", 0, plan())
        raise ValueError("in between")
except ValueError:
    os.write(2, b"afterwards\\n")
"""


def on_a_terminal(program: str, *arguments: str) -> tuple[int, str]:
    """Exit code, and what a terminal of 80 columns is given."""
    ours, theirs = pty.openpty()
    size = {"COLUMNS": "80", "LINES": "40", "TERM": "xterm"}
    environment = os.environ | size | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, *arguments], stderr=theirs, env=environment)
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    return done.returncode, text


def test_warnings_do_not_tear_the_panel(tmp_path: Path) -> None:
    code, text = on_a_terminal(ASIDE, str(tmp_path / "log.txt"))
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.strip("\r") for line in text.splitlines()]
    assert "[W of C++]" in lines and "afterwards" in lines and any("of Python" in line for line in lines), text
    assert all(line.endswith("╮") for line in lines if "╭" in line), text
    log = (tmp_path / "log.txt").read_text()
    assert "[W of C++]\n" in log and "step 1/" in log and "afterwards" not in log
    assert "ended by ValueError: in between" in log


def test_a_program_reads_the_figures_as_json(volumes: Path, gpt2box: Command) -> None:
    done = gpt2box("train", *tiny(name="a", max_steps=20, eval_interval=10, log_interval=5), "--log-format=json")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (volumes / "runs/a/metrics.jsonl").read_text()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["step"], row["kind"]) for row in rows] == [
        (0, "eval"), (5, "train"), (10, "train"), (10, "eval"), (15, "train"), (20, "train"), (20, "eval"),
    ]  # fmt: skip
    assert rows[1]["mfu"] is None, "nothing is known of this CPU's peak"
    assert "tokens/s" not in done.stderr and "finished at step 20" in done.stderr
    again = gpt2box("train", *tiny(name="a", max_steps=20, eval_interval=10, log_interval=5, seed=5))
    log = (volumes / "runs/a/log.txt").read_text()
    assert "tokens/s" in log and again.returncode == 2 and "seed: 1337 before, 5 now" in log, "errors, too"


def test_the_share_of_the_peak_is_that_of_the_models_own_arithmetic() -> None:
    mine = plan()
    per_token = 6 * mine.shape.parameters + 12 * 24 * 1024 * 1024
    assert mine.mfu(10_000) == pytest.approx(10_000 * per_token / 58.3e12, abs=1e-4)
    assert mine.with_derived(peak_tflops=0.0).mfu(10_000) is None
    assert plan(init_from="gpt2-medium", lora_rank="4").mfu(10_000) is None


def test_the_panel_says_what_is_known_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display("a", 0, plan())
    assert display.panel_lines() == {}
    display.show_train_row(10, {**ROW, "loss": 4.0}, 100)
    display.show_train_row(20, ROW, 90)
    display.show_evaluation(20, 3.2, True, 3.2, 20)
    display.show_evaluation(30, 3.5, False, 3.2, 20)
    display.show_sample(["To be\x1b[2J"])
    found = display.panel_lines()
    assert found["loss"] == "3.0000  █▁  -1.0000 in 10 steps"
    assert found["val_loss"] == "3.5000 at step 30, best 3.2000 at step 20"
    assert found["speed"] == "10,000 tokens/s, MFU 40% of 58.3 TFLOPS"
    assert found["sample"] == "To be�[2J" and "\x1b" not in capsys.readouterr().err
    display.show_train_row(30, {**ROW, "loss": None, "grad_norm": None, "skipped_steps": 2, "mfu": None}, 80)
    found = display.panel_lines()
    assert "2 steps left out: loss or gradient not finite" in found["optimizer"] and "MFU" not in found["speed"]
    display.show_train_row(30, {**ROW, "skipped_steps": 3, "loss_spikes": 1}, 80)
    assert "3 steps left out: loss not finite or far above the steps before" in display.panel_lines()["optimizer"]


STOPPED = """
import os, signal, sys, time
from pathlib import Path
from gpt2box.utils.progress import run_log_file
from gpt2box.utils.signals import StopRequest
from tests.training.test_console import ROW, Display, plan
with run_log_file(Path(sys.argv[1])):
    stop = StopRequest().install()
    display = Display("a", 0, plan())
    with stop.awaited():
        display.show_train_row(1, ROW, 9)
        for _ in range(int(sys.argv[2])):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    display.close()
"""


@pytest.mark.parametrize(("signals", "code"), [(1, 0), (2, 130)])
def test_a_request_to_stop_is_in_the_panel(tmp_path: Path, signals: int, code: int) -> None:
    ended, text = on_a_terminal(STOPPED, str(tmp_path / "log.txt"), str(signals))
    assert ended == code
    assert "\x1b[?25h" in text, "the cursor is there again"
    lines = [line.strip("\r") for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()]
    assert any(line.startswith("│ stopping   SIGINT: finishing this step") for line in lines), text
    assert not any("finishing" in line and not line.startswith("│") for line in lines), text
    assert "finishing this step" in (tmp_path / "log.txt").read_text()
    assert (signals == 2) == any(line.startswith("SIGINT: ended without saving") for line in lines)
