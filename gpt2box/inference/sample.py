"""Text from a run, a checkpoint or a published model."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from gpt2box.checkpoint.metadata import check_model
from gpt2box.config.schema import MODEL_SHAPES
from gpt2box.data import hub_models
from gpt2box.data.pretrained import pretrained_folder, shape_in
from gpt2box.data.tokenizer import Tokenizer, of_model, prompt_ids
from gpt2box.errors import BadInput, Damaged, harmless_lines, why
from gpt2box.model.decoder import Decoder
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import load_hub
from gpt2box.model.sampling import Choice, generate, generate_together
from gpt2box.system.device import choose_device
from gpt2box.utils.files import parse_json
from gpt2box.utils.paths import NAME, checkpoint_of, run_folders, runs_dir


def find_model(argument: str | None, which: str) -> Path:
    """The folder of a model: a run's checkpoint by the run's name, a folder, a published size, or the newest run's.

    `which` names the checkpoint of a run: best, last or step-N.

    Raises:
        BadInput: nothing by that name, with what there is.
    """
    found = [(checkpoint_of(path, "last"), path.name) for path in run_folders()]
    newest = sorted(((path.lstat().st_mtime, name) for path, name in found if path), reverse=True)
    names = [name for _, name in newest]
    if argument is None:
        if not names:
            raise BadInput(
                f"no run with a checkpoint in {runs_dir()}",
                "a trained model",
                "gpt2box train demo, or gpt2box sample gpt2",
            )
        argument = names[0]
    if NAME.fullmatch(argument) and argument in names:
        run = runs_dir() / argument
        if there := checkpoint_of(run, which):
            return there
        have = sorted(path.name for path in (run / "checkpoints").glob("[bls]*"))
        raise BadInput(f"run {argument} has no checkpoint {which}", ", ".join(have))
    if (Path(argument) / "config.json").is_file():
        return Path(argument)
    if argument in MODEL_SHAPES or hub_models.NAME.fullmatch(argument):
        return pretrained_folder(argument)
    raise BadInput(
        f"no model {argument!r}",
        f"a run ({', '.join(names) or 'none yet'}), a folder with config.json, OWNER/NAME of the Hub, "
        f"or one of {', '.join(MODEL_SHAPES)}",
    )


def load_model(folder: Path, device: str) -> tuple[GPT2, Tokenizer]:
    """The model in `folder` on a device, and its tokenizer (GPT-2's where the folder has none).

    Raises:
        Damaged: it is a checkpoint that is not what was written; or see load_hub.
    """
    check_model(folder)
    shape = shape_in(folder)
    files = list(folder.glob("*.safetensors"))
    stored = sum(path.stat().st_size for path in files)
    if not files:
        raise BadInput(f"no weights in {folder}", "model.safetensors")
    if stored < shape.parameters:  # not even a byte each: before memory for them is asked for
        found = f"{folder}: config.json says {shape.parameters:,} parameters, its .safetensors have {stored:,} bytes"
        raise Damaged(found, "weights of that shape")
    model = GPT2.empty(shape, 0.0, choose_device(device))
    load_hub(model, folder)
    words = of_model(folder, shape.vocab_size)
    if words.vocab_size > shape.vocab_size:
        raise BadInput(f"{folder}: {words.vocab_size:,} tokens in its tokenizer, {shape.vocab_size:,} in its model")
    model.shape = replace(shape, vocab_size=words.vocab_size)  # some weights are stored with padding rows
    return model, words


def sample(
    decoder: Decoder,
    words: Tokenizer,
    prompts: Sequence[str],
    num_samples: int,
    max_new_tokens: int,
    choice: Choice,
    seed: int,
    batch_size: int,
    as_json: bool,
) -> None:
    """Write samples of each prompt to standard output; one at a time they are seen as they come.

    Sample i of a prompt follows from seed + i; with others in a batch, but for rounding.

    Raises:
        BadInput: a prompt has a character that the model lacks.
    """
    encoded = [(prompt, prompt_ids(words, prompt)) for prompt in prompts]
    jobs = ((prompt, ids, seed + i) for prompt, ids in encoded for i in range(num_samples))
    first = -batch_size
    while chosen := list(islice(jobs, batch_size)):
        first += batch_size
        if batch_size == 1 and not as_json:
            print("\n---------------\n" * (first > 0), end="")
            sys.stdout.write(for_terminal(chosen[0][0]))
            stream(decoder, words, chosen[0][1], max_new_tokens, choice, chosen[0][2], [])
            print()
            continue
        ids = [ids for _, ids, _ in chosen]
        seeds = [seed for _, _, seed in chosen]
        steps = list(generate_together(decoder, ids, max_new_tokens, choice, seeds, words.end_of_text))
        for row, (prompt, _, own_seed) in enumerate(chosen):
            written = [step[row] for step in steps if step[row] is not None]
            text = words.decode_bytes(written).decode("utf-8", errors="replace")  # type: ignore[arg-type]
            if as_json:
                ended = "end of text" if len(written) < max_new_tokens else "max_new_tokens"
                about = {"prompt": prompt, "text": text, "seed": own_seed, "tokens": len(written), "ended": ended}
                print(json.dumps(about, ensure_ascii=False), flush=True)
            else:
                print("\n---------------\n" * (first + row > 0) + for_terminal(prompt + text), flush=True)


def stream(
    decoder: Decoder,
    words: Tokenizer,
    ids: list[int],
    max_new_tokens: int,
    choice: Choice,
    seed: int,
    written: list[int],
) -> None:
    """Write a text to standard output as it comes; `written` takes its ids, also where it is interrupted."""
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        for token in generate(decoder, ids, max_new_tokens, choice, seed, stop_at=words.end_of_text):
            written.append(token)
            sys.stdout.write(for_terminal(characters.decode(words.decode_bytes([token]))))
            sys.stdout.flush()
    finally:
        sys.stdout.write(characters.decode(b"", final=True))
        sys.stdout.flush()


def for_terminal(text: str) -> str:
    """On a terminal, what a model writes does not steer it; into a file or a pipe it goes as it is."""
    return harmless_lines(text) if sys.stdout.isatty() else text


def prompts_in(path: Path) -> list[str]:
    """The prompts of a file: its lines, or the "prompt" of each record of a .jsonl.

    Raises:
        BadInput: none, or not of that form.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.rstrip("\n") for line in file if line.strip()]
        prompts = [parse_json(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
        "".join(prompts).encode()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: {why(error)}", 'a prompt a line, or in .jsonl {"prompt": "…"} a line') from error
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise BadInput(f"{path}: no prompts", 'a prompt a line, or in .jsonl {"prompt": "…"} a line')
    return prompts
