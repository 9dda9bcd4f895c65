"""`gpt2box sample --interactive`: write on with the model, line by line."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import fields, replace

from gpt2box.data.instructions import TEMPLATE
from gpt2box.data.tokenizer import Tokenizer, prompt_ids
from gpt2box.errors import BadInput
from gpt2box.inference.sample import stream
from gpt2box.model.decoder import Decoder
from gpt2box.model.sampling import Choice

HELP = """  a line            the model goes on from it and from all before it
  /temperature 0.7  how freely it chooses; also /top_k 200, /top_p 0.9, /max_new_tokens 100, /seed 7
  /settings         as they are
  /reset            forget what was said
  /quit             or Ctrl-D; Ctrl-C ends a text that is being written"""


def talk(
    decoder: Decoder, words: Tokenizer, begin: str, max_new_tokens: int, choice: Choice, seed: int, instruct: bool
) -> None:
    """Until the input ends: read a line, write what the model makes of all so far."""
    shown = sys.stdin.isatty()
    if shown:
        import readline  # noqa: F401, input() then edits and remembers lines

        print("The model goes on from what you write. /help lists the commands.")
    history, turn = begin, 0
    numbers = {"max_new_tokens": max_new_tokens, "seed": seed}
    while True:
        try:
            line = input("> " if shown else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if line in ("/quit", "/exit"):
                return
            if line == "/reset":
                history = begin
            elif line == "/help":
                print(HELP)
            elif line == "/settings":
                print("  " + "  ".join(f"{name} {value}" for name, value in {**vars(choice), **numbers}.items()))
            elif line.startswith("/"):
                choice, numbers = changed(line, choice, numbers)
            else:
                text = history + (TEMPLATE.format(prompt=line) if instruct else line)
                ids = prompt_ids(words, text)
                written: list[int] = []
                with suppress(KeyboardInterrupt):
                    length, own_seed = numbers["max_new_tokens"], numbers["seed"] + turn
                    stream(decoder, words, ids, length, choice, own_seed, written)
                print()
                turn += 1
                history = text + words.decode_bytes(written).decode("utf-8", errors="replace") + "\n"
        except BadInput as error:
            print(error, file=sys.stderr)


def changed(line: str, choice: Choice, numbers: dict[str, int]) -> tuple[Choice, dict[str, int]]:
    """The settings after a command such as /temperature 0.7.

    Raises:
        BadInput: no such command, or no such value.
    """
    name, _, value = line[1:].partition(" ")
    name = name.replace("-", "_")
    limits = {"temperature": (0, 100), "top_k": (0, 10**6), "top_p": (1e-9, 1), "max_new_tokens": (1, 10**6)}
    kinds = {field.name: type(getattr(choice, field.name)) for field in fields(Choice)} | dict.fromkeys(numbers, int)
    if name not in kinds:
        raise BadInput(f"no command /{name}", "/help lists them")
    low, high = limits.get(name, (0, 2**62))
    try:
        number = kinds[name](value)
        if not low <= number <= high:
            raise ValueError
    except ValueError:
        raise BadInput(f"/{name} {value}", f"a number from {low} to {high}") from None
    if name in numbers:
        return choice, numbers | {name: int(number)}
    return replace(choice, **{name: number}), numbers
