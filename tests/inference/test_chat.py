"""`gpt2box sample --interactive`."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.commands import Command


def test_chat_keeps_the_history_and_obeys_commands(run: Path, gpt2box: Command) -> None:
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
