"""Continue texts interactively, line by line (`gpt2box sample --interactive`)."""

import sys
from contextlib import suppress
from dataclasses import fields, replace

from gpt2box.data.instructions import TEMPLATE
from gpt2box.data.tokenizer import Tokenizer, encode_prompt
from gpt2box.errors import BadInput
from gpt2box.inference.sample import stream
from gpt2box.model.decoder import Decoder
from gpt2box.model.sampling import SamplingParams

HELP = """  a line            the model continues from this line and all text before it
  /temperature 0.7  how freely it samples; also /top_k 200, /top_p 0.9, /max_new_tokens 100, /seed 7
  /settings         show these settings
  /reset            forget the text so far
  /quit             or Ctrl-D; Ctrl-C stops a text that is being written"""


def chat(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    params: SamplingParams,
    seed: int,
    use_template: bool,
) -> None:
    """Read lines from standard input until it ends, and continue the text after each.

    Each text uses the next seed. `use_template` wraps each line in the template of instruction data.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 gives input() line editing and a history

        print("The model continues what you write. /help lists the commands.")
    history, answers = prompt, 0
    limits = {"max_new_tokens": max_new_tokens, "seed": seed}
    while True:
        try:
            line = input("> " if is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if line in ("/quit", "/exit"):
                return
            if line == "/reset":
                history = prompt
            elif line == "/help":
                print(HELP)
            elif line == "/settings":
                print("  " + "  ".join(f"{name} {value}" for name, value in {**vars(params), **limits}.items()))
            elif line.startswith("/"):
                params, limits = apply_command(line, params, limits)
            else:
                text = history + (TEMPLATE.format(prompt=line) if use_template else line)
                ids = encode_prompt(tokenizer, text)
                generated: list[int] = []
                with suppress(KeyboardInterrupt):
                    length, answer_seed = limits["max_new_tokens"], limits["seed"] + answers
                    stream(decoder, tokenizer, ids, length, params, answer_seed, generated)
                print()
                answers += 1
                history = text + tokenizer.decode_bytes(generated).decode("utf-8", errors="replace") + "\n"
        except BadInput as error:
            print(error, file=sys.stderr)


def apply_command(line: str, params: SamplingParams, limits: dict[str, int]) -> tuple[SamplingParams, dict[str, int]]:
    """Return the settings after a command such as `/temperature 0.7`.

    Raises BadInput: there is no such command, or its value is out of range.
    """
    name, _, value = line[1:].partition(" ")
    name = name.replace("-", "_")
    ranges = {"temperature": (0, 100), "top_k": (0, 10**6), "top_p": (1e-9, 1), "max_new_tokens": (1, 10**6)}
    types = {field.name: type(getattr(params, field.name)) for field in fields(params)} | dict.fromkeys(limits, int)
    if name not in types:
        raise BadInput(f"no command /{name}", "/help lists them")
    low, high = ranges.get(name, (0, 2**62))
    try:
        number = types[name](value)
        if not low <= number <= high:
            raise ValueError
    except ValueError:
        raise BadInput(f"/{name} {value}", f"a number from {low} to {high}") from None
    if name in limits:
        return params, limits | {name: int(number)}
    return replace(params, **{name: number}), limits
