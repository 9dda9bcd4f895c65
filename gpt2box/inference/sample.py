"""Write text samples from a model to standard output."""

import codecs
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from gpt2box.data.tokenizer import Tokenizer, encode_prompt
from gpt2box.errors import BadInput, describe_error, escape_control_lines
from gpt2box.model.decoder import Decoder
from gpt2box.model.sampling import SamplingParams, generate, generate_batch
from gpt2box.utils.files import parse_json

SEPARATOR = "\n---------------\n"


def write_samples(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_samples: int,
    max_new_tokens: int,
    params: SamplingParams,
    seed: int,
    batch_size: int,
    as_json: bool,
) -> None:
    """Write `num_samples` samples of each prompt to standard output; with a batch size of 1, token by token.

    Sample i of a prompt uses seed + i. Batching changes logits by rounding only.

    Raises BadInput: a prompt has a character that the model's vocabulary lacks.
    """
    encoded = [(prompt, encode_prompt(tokenizer, prompt)) for prompt in prompts]
    requests = ((prompt, ids, seed + i) for prompt, ids in encoded for i in range(num_samples))
    written = 0
    while batch := list(islice(requests, batch_size)):
        if batch_size == 1 and not as_json:
            ((prompt, ids, sample_seed),) = batch
            sys.stdout.write(SEPARATOR * (written > 0) + escape_for_terminal(prompt))
            stream(decoder, tokenizer, ids, max_new_tokens, params, sample_seed, [])
            print()
            written += 1
            continue
        batch_ids, seeds = [ids for _, ids, _ in batch], [sample_seed for _, _, sample_seed in batch]
        steps = list(generate_batch(decoder, batch_ids, max_new_tokens, params, seeds, tokenizer.end_of_text))
        for row, (prompt, _, sample_seed) in enumerate(batch):
            tokens = [token for step in steps if (token := step[row]) is not None]
            text = tokenizer.decode_bytes(tokens).decode("utf-8", errors="replace")
            if as_json:
                ended = "end of text" if len(tokens) < max_new_tokens else "max_new_tokens"
                sample = {"prompt": prompt, "text": text, "seed": sample_seed, "tokens": len(tokens), "ended": ended}
                print(json.dumps(sample, ensure_ascii=False), flush=True)
            else:
                print(SEPARATOR * (written > 0) + escape_for_terminal(prompt + text), flush=True)
            written += 1


def stream(
    decoder: Decoder,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int,
    params: SamplingParams,
    seed: int,
    generated: list[int],
) -> None:
    """Write a text to standard output token by token; append its ids to `generated`, also if interrupted."""
    utf8_decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        for token in generate(decoder, ids, max_new_tokens, params, seed, stop_at=tokenizer.end_of_text):
            generated.append(token)
            sys.stdout.write(escape_for_terminal(utf8_decoder.decode(tokenizer.decode_bytes([token]))))
            sys.stdout.flush()
    finally:
        sys.stdout.write(utf8_decoder.decode(b"", final=True))
        sys.stdout.flush()


def escape_for_terminal(text: str) -> str:
    """Escape control characters if standard output is a terminal; files and pipes get the text unchanged."""
    return escape_control_lines(text) if sys.stdout.isatty() else text


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a file: one per line, or the "prompt" field of each record of a .jsonl.

    Raises BadInput: the file has no prompts or another format.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.rstrip("\n") for line in file if line.strip()]
        prompts = [parse_json(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
        "".join(prompts).encode()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path}: {describe_error(error)}", 'one prompt per line, or {"prompt": "…"} in .jsonl'
        ) from error
    if not prompts:
        raise BadInput(f"{path}: no prompts", 'one prompt per line, or {"prompt": "…"} in .jsonl')
    return prompts
