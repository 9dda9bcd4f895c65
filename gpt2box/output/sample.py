"""Text from a run, a checkpoint or a published model."""

from __future__ import annotations

import codecs
import sys
from dataclasses import replace
from pathlib import Path

from gpt2box.config import MODEL_SHAPES
from gpt2box.data import assets, tokenizer
from gpt2box.data.published import pretrained_folder, shape_in
from gpt2box.data.tokenizer import Tokenizer, prompt_ids
from gpt2box.errors import BadInput
from gpt2box.machine.device import choose_device
from gpt2box.model.generate import Choice, generate
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.weights import load_hub
from gpt2box.paths import NAME, raw_dir, runs_dir


def find_model(argument: str | None, which: str) -> Path:
    """The folder of a model: a run's checkpoint by the run's name, a folder, a published size, or the newest run's.

    `which` names the checkpoint of a run: best, last or step-N.

    Raises:
        BadInput: nothing by that name, with what there is.
    """
    runs = sorted(runs_dir().glob("*/checkpoints/last"), key=lambda path: path.lstat().st_mtime, reverse=True)
    names = [path.parents[1].name for path in runs]
    if argument is None:
        if not names:
            raise BadInput(
                f"no run with a checkpoint in {runs_dir()}",
                "a trained model",
                "gpt2box train demo, or gpt2box sample gpt2",
            )
        argument = names[0]
    if NAME.fullmatch(argument) and argument in names:
        folder = runs_dir() / argument / "checkpoints"
        if which == "best" and not (folder / "best").exists():
            which = "last"
        if not (folder / which).exists():
            raise BadInput(
                f"run {argument} has no checkpoint {which}",
                ", ".join(sorted(path.name for path in folder.glob("[bls]*"))),
            )
        return folder / which
    if (Path(argument) / "config.json").is_file():
        return Path(argument)
    if argument in MODEL_SHAPES:
        return pretrained_folder(argument)
    raise BadInput(
        f"no model {argument!r}",
        f"a run ({', '.join(names) or 'none yet'}), a folder with config.json, or one of {', '.join(MODEL_SHAPES)}",
    )


def load_model(folder: Path, device: str) -> tuple[GPT2, Tokenizer]:
    """The model in `folder` on a device, and its tokenizer (GPT-2's where the folder has none)."""
    shape = shape_in(folder)
    model = GPT2.empty(shape, 0.0, choose_device(device))
    load_hub(model, folder)
    has_own = any((folder / name).exists() for name in ("vocab.json", "tokenizer.json"))
    words = tokenizer.load(folder) if has_own else tokenizer.from_ranks(assets.fetch(assets.GPT2_RANKS, raw_dir()))
    if words.vocab_size > shape.vocab_size:
        raise BadInput(f"{folder}: {words.vocab_size:,} tokens in its tokenizer, {shape.vocab_size:,} in its model")
    model.shape = replace(shape, vocab_size=words.vocab_size)  # some weights are stored with padding rows
    return model, words


def sample(
    model: GPT2, words: Tokenizer, prompt: str, num_samples: int, max_new_tokens: int, choice: Choice, seed: int
) -> None:
    """Write samples to standard output as they come. Sample i depends on seed + i alone.

    Raises:
        BadInput: the prompt has a character that the model lacks.
    """
    ids = prompt_ids(words, prompt)
    for index in range(num_samples):
        if index:
            print("\n---------------")
        sys.stdout.write(prompt)
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in generate(model, ids, max_new_tokens, choice, seed + index, stop_at=words.end_of_text):
            sys.stdout.write(characters.decode(words.decode_bytes([token])))
            sys.stdout.flush()
        print(characters.decode(b"", final=True))
