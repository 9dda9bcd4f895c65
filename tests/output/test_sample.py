"""`gpt2box sample`, and what others make of a checkpoint folder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2box.data.pretrained import shape_in
from gpt2box.inference.sample import prompts_in
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import load_hub
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.commands import Command, command
from tests.helpers.settings import TINY, options


@pytest.fixture
def run(volumes: Path) -> Path:
    """A short run's folder."""
    run_job(None, {key: str(value) for key, value in {**TINY, "name": "run"}.items()}, StopRequest())
    return volumes / "runs" / "run"


def test_the_newest_run_is_sampled_and_a_seed_gives_one_text(run: Path, gpt2box: Command) -> None:
    first, again = (gpt2box("sample", "--prompt", "ROMEO:", "--max-new-tokens", "100", "-n", "2") for _ in range(2))
    assert first.returncode == 0 and "checkpoints/best" in first.stderr
    assert first.stdout == again.stdout and first.stdout.count("ROMEO:") >= 2
    assert len(first.stdout) == 2 * (106 + 1) + len("\n---------------\n")
    one, two = first.stdout.split("\n---------------\n")
    assert one != two.rstrip("\n")
    second = gpt2box("sample", "run", "--prompt", "ROMEO:", "--max-new-tokens", "100", "--seed", "1338")
    assert second.stdout == two  # sample i follows from seed + i


def test_the_prompt_may_come_from_a_file_or_standard_input(run: Path, gpt2box: Command, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Ay, ")
    expected = gpt2box("sample", "--prompt", "Ay, ", "--max-new-tokens", "20").stdout
    assert gpt2box("sample", "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "20").stdout == expected
    assert gpt2box("sample", "--prompt-file", "-", "--max-new-tokens", "20", input="Ay, ").stdout == expected
    assert gpt2box("sample", "--start=Ay, ", "--max_new_tokens=20").stdout == expected  # nanoGPT's spelling


def test_several_prompts_and_samples_are_written_together_or_one_by_one(
    run: Path, gpt2box: Command, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("ROMEO:\nTo be, or\n\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ROMEO:"}\n{"prompt": "To be, or"}\n')
    few = ["--max-new-tokens", "40", "-n", "2"]
    one_by_one = gpt2box("sample", "--prompts", str(tmp_path / "prompts.txt"), *few)
    together = gpt2box("sample", "--prompts", str(tmp_path / "prompts.jsonl"), *few, "--batch-size", "3", "--json")
    objects = [json.loads(line) for line in together.stdout.splitlines()]
    assert [(o["prompt"], o["seed"]) for o in objects] == [
        (prompt, seed) for prompt in ("ROMEO:", "To be, or") for seed in (1337, 1338)
    ]
    assert one_by_one.stdout.split("\n---------------\n") == [o["prompt"] + o["text"] + "\n" for o in objects]
    assert all(o["tokens"] == len(o["text"]) == 40 and o["ended"] == "max_new_tokens" for o in objects)


def test_a_conversation_keeps_its_history_and_obeys_commands(run: Path, gpt2box: Command) -> None:
    lines = [
        "ROMEO:",
        "/temperature 0",
        "/max_new_tokens 5",
        "Ay",
        "/settings",
        "/reset",
        "Ay",
        "/top_p 7",
        "/what",
    ]
    done = gpt2box("sample", "--interactive", "--max-new-tokens", "30", input="\n".join(lines) + "\n")
    first = gpt2box("sample", "--prompt", "ROMEO:", "--max-new-tokens", "30").stdout.removeprefix("ROMEO:")
    assert done.returncode == 0 and done.stdout.startswith(first), done.stderr
    history = "ROMEO:" + first.removesuffix("\n") + "\nAy"
    greedy = ["--temperature", "0", "--max-new-tokens", "5"]
    second = gpt2box("sample", "--prompt-file", "-", *greedy, input=history).stdout.removeprefix(history)
    fresh = gpt2box("sample", "--prompt", "Ay", *greedy).stdout.removeprefix("Ay")
    rest = done.stdout.removeprefix(first)
    assert rest.startswith(second) and rest.rstrip("\n").endswith(fresh.rstrip("\n"))
    assert "temperature 0.0  top_k 200" in done.stdout
    assert "/top_p 7" in done.stderr and "no command /what" in done.stderr


def test_instruct_puts_the_prompt_as_instruction_data_has_it(run: Path, gpt2box: Command) -> None:
    refused = gpt2box("sample", "--instruct", "--prompt", "x", "--max-new-tokens", "3")
    assert refused.returncode == 2 and "'#' (U+0023)" in refused.stderr  # Shakespeare has none


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_prompt_ends_with_its_line(tmp_path: Path, name: str) -> None:
    """Which neither U+2028 nor another sign ends, but for Python; a byte-order mark is no part of the first."""
    prompts = ["a\u2028b\x0c\x85c", "d"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in prompts] if name == "a.jsonl" else prompts
    (tmp_path / name).write_bytes(("\ufeff" + "\r\n\n".join(lines)).encode())
    assert prompts_in(tmp_path / name) == prompts


def test_bad_requests_say_what_there_is(run: Path, gpt2box: Command) -> None:
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


def test_any_temperature_and_number_of_samples_is_begun_with(run: Path, tmp_path: Path) -> None:
    for temperature in ("1e-50", "1e-320", "1e300"):
        assert command("sample", "run", "--temperature", temperature, "--max-new-tokens", "3")[0] == 0
    cold = [command("sample", "run", "--temperature", value, "--max-new-tokens", "9")[1] for value in ("0", "1e-9")]
    assert cold[0] == cold[1]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "\\ud800"}\n')
    for text in ('{"prompt": "\\ud800"}\n', "[" * 100_000 + "\n"):
        (tmp_path / "prompts.jsonl").write_text(text)
        code, said = command("sample", "run", "--prompts", str(tmp_path / "prompts.jsonl"))
        assert code == 2 and "Traceback" not in said, said
    endless = [sys.executable, "-m", "gpt2box", "sample", "run", "-n", str(10**30), "--max-new-tokens", "1"]
    with subprocess.Popen(endless, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout and running.stdout.readline()
        running.kill()


def test_a_terminal_is_not_steered_by_what_is_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("to \x1b[31mbe\n")
    source = [sys.executable, "-m", "gpt2box", "prepare", str(tmp_path / "text.txt"), "--name", "steering"]
    (tmp_path / "text.txt").write_text("to be \x1b[31mor not\n" * 300)
    subprocess.run([*source, "--tokenizer", "char"], check=True, capture_output=True)
    settings = {**TINY, "dataset": "steering", "name": "steering", "max_steps": 1, "sample_tokens": 100}
    code, said = command("train", *options(**settings))
    assert code == 0 and "\x1b" not in said, said
    words = [
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
    assert b"\x1b" in subprocess.run(words, check=True, capture_output=True).stdout  # as it is, into a pipe
    terminal, end = os.openpty()
    subprocess.run(words, check=True, stdout=end, stderr=end)
    os.close(end)
    written = b""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 1 << 16):
            written += piece
    assert b"\\x1b[31mbe" in written and b"\x1b" not in written


def test_without_a_run_it_says_how_to_get_one(volumes: Path, gpt2box: Command) -> None:
    done = gpt2box("sample")
    assert done.returncode == 2 and "gpt2box train demo" in done.stderr


def test_a_checkpoint_is_a_hugging_face_folder(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "checkpoints" / "best"
    theirs, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "But soft, what light"
    x = words(text, return_tensors="pt")["input_ids"]
    assert x.shape == (1, len(text)) and words.decode(x[0]) == text
    ours = GPT2(shape_in(folder))
    load_hub(ours, folder)
    with torch.no_grad():
        assert (theirs(x).logits - ours.logits(ours.hidden(x))).abs().max() <= 1e-4
    text = theirs.generate(x, max_new_tokens=5, do_sample=False)
    assert text.shape == (1, x.size(1) + 5)


def test_a_closed_pipe_is_no_traceback(run: Path, gpt2box: Command) -> None:
    read, write = os.pipe()
    os.close(read)
    import subprocess
    import sys

    command = [sys.executable, "-m", "gpt2box", "sample", "--max-new-tokens", "50"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in done.stderr
