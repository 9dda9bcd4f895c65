"""`gpt2box sample`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2box.inference.sample import read_prompts
from tests.helpers.commands import Command, command
from tests.helpers.settings import TINY, options


def test_sample_uses_the_newest_run_and_a_seed_gives_the_same_text_again(run: Path, gpt2box: Command) -> None:
    first, again = (gpt2box("sample", "--prompt", "ROMEO:", "--max-new-tokens", "100", "-n", "2") for _ in range(2))
    assert first.returncode == 0 and "checkpoints/best" in first.stderr
    assert first.stdout == again.stdout and first.stdout.count("ROMEO:") >= 2
    assert len(first.stdout) == 2 * (106 + 1) + len("\n---------------\n")
    one, two = first.stdout.split("\n---------------\n")
    assert one != two.rstrip("\n")
    second = gpt2box("sample", "run", "--prompt", "ROMEO:", "--max-new-tokens", "100", "--seed", "1338")
    assert second.stdout == two  # sample i uses seed + i


def test_the_prompt_may_come_from_a_file_or_standard_input(run: Path, gpt2box: Command, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Ay, ")
    expected = gpt2box("sample", "--prompt", "Ay, ", "--max-new-tokens", "20").stdout
    assert gpt2box("sample", "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "20").stdout == expected
    assert gpt2box("sample", "--prompt-file", "-", "--max-new-tokens", "20", input="Ay, ").stdout == expected
    assert gpt2box("sample", "--start=Ay, ", "--max_new_tokens=20").stdout == expected  # nanoGPT's spelling


def test_batched_samples_equal_samples_written_one_by_one(run: Path, gpt2box: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("ROMEO:\nTo be, or\n\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ROMEO:"}\n{"prompt": "To be, or"}\n')
    limits = ["--max-new-tokens", "40", "-n", "2"]
    one_by_one = gpt2box("sample", "--prompts", str(tmp_path / "prompts.txt"), *limits)
    together = gpt2box("sample", "--prompts", str(tmp_path / "prompts.jsonl"), *limits, "--batch-size", "3", "--json")
    objects = [json.loads(line) for line in together.stdout.splitlines()]
    assert [(o["prompt"], o["seed"]) for o in objects] == [
        (prompt, seed) for prompt in ("ROMEO:", "To be, or") for seed in (1337, 1338)
    ]
    assert one_by_one.stdout.split("\n---------------\n") == [o["prompt"] + o["text"] + "\n" for o in objects]
    assert all(o["tokens"] == len(o["text"]) == 40 and o["ended"] == "max_new_tokens" for o in objects)


def test_instruct_wraps_the_prompt_in_the_template_of_instruction_data(run: Path, gpt2box: Command) -> None:
    refused = gpt2box("sample", "--instruct", "--prompt", "x", "--max-new-tokens", "3")
    assert refused.returncode == 2 and "'#' (U+0023)" in refused.stderr  # the template's, which Shakespeare lacks


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_prompts_end_at_line_feeds_only(tmp_path: Path, name: str) -> None:
    """Python's splitlines() also splits at U+2028, form feed and U+0085. A byte-order mark is dropped."""
    prompts = ["a\u2028b\x0c\x85c", "d"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in prompts] if name == "a.jsonl" else prompts
    (tmp_path / name).write_bytes(("\ufeff" + "\r\n\n".join(lines)).encode())
    assert read_prompts(tmp_path / name) == prompts


def test_bad_options_of_sample_fail_with_the_valid_choices(run: Path, gpt2box: Command) -> None:
    for arguments, part in [
        (["--prompt", "naïve"], "'ï' (U+00EF)"),
        (["nothing"], "a run (run), a folder"),
        (["run", "--checkpoint", "step-7"], "last, step-00000010, step-00000020"),
        (["run", "--checkpoint", "../../other/checkpoints/best"], "last, step-00000010, step-00000020"),
        (["--prompt", "a", "--prompt-file", "-"], "one of the two"),
        (["--top-p", "0"], "top-p"),
        (["--interactive", "--json"], "--interactive with"),
        (["--prompts", "/dev/null"], "no prompts"),
        (["--prompt-file", "none.txt"], "none.txt"),
    ]:
        done = gpt2box("sample", *arguments)
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_sample_accepts_extreme_temperatures_and_sample_counts(run: Path, tmp_path: Path) -> None:
    for temperature in ("1e-50", "1e-320", "1e300"):
        assert command("sample", "run", "--temperature", temperature, "--max-new-tokens", "3")[0] == 0
    cold = [command("sample", "run", "--temperature", value, "--max-new-tokens", "9")[1] for value in ("0", "1e-9")]
    assert cold[0] == cold[1]
    for text in ('{"prompt": "\\ud800"}\n', "[" * 100_000 + "\n"):
        (tmp_path / "prompts.jsonl").write_text(text)
        code, output = command("sample", "run", "--prompts", str(tmp_path / "prompts.jsonl"))
        assert code == 2 and "Traceback" not in output, output
    endless = [sys.executable, "-m", "gpt2box", "sample", "run", "-n", str(10**30), "--max-new-tokens", "1"]
    with subprocess.Popen(endless, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout and running.stdout.readline()
        running.kill()


def test_control_characters_are_escaped_on_a_terminal_only(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("to \x1b[31mbe\n")
    source = [sys.executable, "-m", "gpt2box", "prepare", str(tmp_path / "text.txt"), "--name", "steering"]
    (tmp_path / "text.txt").write_text("to be \x1b[31mor not\n" * 300)
    subprocess.run([*source, "--tokenizer", "char"], check=True, capture_output=True)
    settings = {**TINY, "dataset": "steering", "name": "steering", "max_steps": 1, "sample_tokens": 100}
    code, output = command("train", *options(**settings))
    assert code == 0 and "\x1b" not in output, output
    sample = [
        sys.executable,
        "-m",
        "gpt2box",
        "sample",
        "steering",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--max-new-tokens",
        "50",
    ]
    assert b"\x1b" in subprocess.run(sample, check=True, capture_output=True).stdout  # a pipe gets the text unchanged
    terminal, end = os.openpty()
    subprocess.run(sample, check=True, stdout=end, stderr=end)
    os.close(end)
    written = b""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 1 << 16):
            written += piece
    assert b"\\x1b[31mbe" in written and b"\x1b" not in written


def test_a_closed_pipe_ends_sample_without_a_traceback(run: Path, gpt2box: Command) -> None:
    read, write = os.pipe()
    os.close(read)
    arguments = [sys.executable, "-m", "gpt2box", "sample", "--max-new-tokens", "50"]
    done = subprocess.run(arguments, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in done.stderr
