"""`gpt2box prepare`: whatever is given, to a dataset; what it is; whether it is whole."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.config.loader import list_presets, load_config
from gpt2box.data import corpus, hub_models, tokenizer
from gpt2box.data.dataset import SPLITS, open_dataset
from gpt2box.data.dataset_folder import Made, check_content, read_manifest
from gpt2box.data.instructions import columns_in, prepare_instructions
from gpt2box.data.prepare_corpus import Choices, prepare_many
from gpt2box.data.prepare_texts import Request, prepare_few
from gpt2box.data.readers import kind_of
from gpt2box.data.sources import CORPORA, KNOWN, OPENWEBTEXT, is_small, own_files, own_text
from gpt2box.errors import BadInput, Damaged, why
from gpt2box.utils.paths import RECORD_SUFFIXES, checked_name, dataset_dir, make_writable, raw_dir, slug, title_of
from gpt2box.utils.progress import say

HUB = "hub:"
STDIN = "-"
SLICE_DOCUMENTS = 10_000  # openwebtext-10k
VAL_FRACTION_OF_FEW, VAL_FRACTION_OF_MANY, VAL_FRACTION_OF_INSTRUCTIONS = 0.1, 0.01, 0.05
# Twenty tokens a parameter (Hoffmann et al. 2022), of which four passes over the same text are nearly as good as fresh
# text (Muennighoff et al. 2023).
ENOUGH_FOR_MEDIUM = 355_000_000 * 20 // 4
ENOUGH_TO_TUNE = 100_000
MOST_PASSES = 1000  # over a text, of which there is a point in speaking


@dataclass(frozen=True)
class Options:
    """What can be asked besides the text."""

    tokenizer: str = "gpt2"  # or char, a tokenizer's folder, or OWNER/NAME of the Hub
    val_fraction: float | None = None
    text_column: str = ""
    prompt_column: str = ""
    response_column: str = ""
    split: str = "content"  # or nanogpt
    max_docs: int | None = None
    shards: tuple[int, int] | None = None  # of a corpus of many files: the first, and the one after the last
    folder: Path | None = None  # where OpenWebText's files are
    keep_raw: bool = False
    keep_duplicates: bool = False
    workers: int = 0
    hub_config: str = ""
    hub_split: str = ""

    @property
    def in_characters(self) -> bool:
        """Whether a token is a character: such a text is prepared in memory."""
        folder = self.tokenizer not in ("gpt2", "char") and Path(self.tokenizer)
        return self.tokenizer == "char" or (isinstance(folder, Path) and loaded(folder).kind == "char")


loaded = cache(tokenizer.load)


def prepare(inputs: Sequence[str], options: Options, name: str | None = None, folder: Path | None = None) -> Made:
    """Make the dataset of the inputs in `folder`, or called `name`, or after them; says what it is.

    Raises:
        BadInput: inputs or options that cannot be, or that do not go together.
        Damaged, TryAgain, VolumeUnwritable: what files, network and disk have.
    """
    item = known_among(inputs)
    asked, options = options.tokenizer, replace(options, tokenizer=resolved(options.tokenizer))
    check_apart(item, options)
    usual = usual_name(inputs[0], replace(options, tokenizer="gpt2" if options.tokenizer == "gpt2" else asked))
    target = folder or dataset_dir(checked_name(name or usual, "dataset"))
    if item in OPENWEBTEXT or item.startswith(HUB):
        made = prepare_many(large(item, options), choices_of(item, options), target)
    else:
        made = own(item, inputs, options, target)
    manifest, written = made
    if not written:
        say("nothing to do: it is there already, made from the same text")
    say("\n".join([*summary(target, manifest), *([] if folder else [next_command(target, manifest)])]))
    return made


def resolved(asked: str) -> str:
    """gpt2 or char, or the folder of the tokenizer that is asked for; gpt2 where that is GPT-2's own.

    Raises:
        BadInput: no such tokenizer.
        TryAgain: the Hub does not answer.
    """
    if asked in ("gpt2", "char"):
        return asked
    folder = Path(asked)
    if not folder.is_dir():
        if not hub_models.NAME.fullmatch(asked):
            raise BadInput(f"--tokenizer {asked}", "gpt2, char, the folder of a tokenizer, or OWNER/NAME of the Hub")
        folder = hub_models.hub_tokenizer(asked)
    return "gpt2" if loaded(folder).kind == "gpt2" else str(folder)


def known_among(inputs: Sequence[str]) -> str:
    """The input that is a corpus known by name or on the Hub, or nothing.

    Raises:
        BadInput: with others beside it.
    """
    known = [item for item in inputs if item in KNOWN or item.startswith(HUB)]
    if known and len(inputs) > 1:
        raise BadInput(f"{known[0]} together with other inputs", "one known corpus, or files and folders of your own")
    if known and known[0] == HUB:
        raise BadInput(f"no dataset after {HUB}", f"{HUB}OWNER/NAME")
    return known[0] if known else ""


def usual_name(first: str, options: Options) -> str:
    """What a dataset is called after its (first) input."""
    if first.startswith(HUB):
        title = "-".join(filter(None, [first.removeprefix(HUB), options.hub_config, options.hub_split]))
    else:
        title = first if first in KNOWN else "stdin" if first == STDIN else title_of(Path(first))
    parts = [slug(title)]
    parts += [slug(Path(options.tokenizer.partition("@")[0]).name)] if options.tokenizer != "gpt2" else []
    parts += list(map(str, options.shards or ()))
    parts += ["first", str(options.max_docs)] if options.max_docs else []
    return "-".join(parts)


def check_apart(item: str, options: Options) -> None:
    """Whether each option has a meaning for this input.

    Raises:
        BadInput: one has none.
    """
    kind = "hub" if item.startswith(HUB) else "openwebtext" if item in OPENWEBTEXT else "corpus" if item else "own"
    given = {name for name, value in vars(options).items() if value != getattr(Options(), name)}
    for_all = {"tokenizer", "val_fraction"}
    for_many = for_all | {"text_column", "split", "max_docs", "keep_duplicates", "workers"}
    in_files = {"shards", "keep_raw"}
    allowed = {
        "corpus": for_all,
        "own": for_many | {"prompt_column", "response_column"},
        "openwebtext": for_many | in_files | {"folder"},
        "hub": for_many | in_files | {"hub_config", "hub_split"},
    }[kind]
    if options.in_characters:
        allowed -= {"max_docs", "split"} | ({"tokenizer"} if kind in ("openwebtext", "hub") else set())
    if wrong := sorted(given - allowed):
        flag = "from" if wrong[0] == "folder" else wrong[0].replace("_", "-")
        of = item or "files" + (" in characters" if options.in_characters else "")
        raise BadInput(f"--{flag} has no meaning for {of}", "see gpt2box prepare --help")


def large(item: str, options: Options) -> corpus.Collection:
    """OpenWebText or a dataset of the Hub."""
    shards = options.shards or ((0, 1) if item == "openwebtext-10k" else None)
    files = slice(*shards) if shards else slice(None)
    if item in OPENWEBTEXT:
        return corpus.openwebtext(options.folder, files, options.keep_raw)
    split = options.hub_split or "train"
    return corpus.from_hub(item.removeprefix(HUB), options.hub_config, split, files, options.keep_raw)


def choices_of(item: str, options: Options) -> Choices:
    """The part of the options that the bytes follow from."""
    return Choices(
        options.val_fraction or OPENWEBTEXT.get(item, VAL_FRACTION_OF_MANY),
        options.split,
        options.text_column,
        options.max_docs or (SLICE_DOCUMENTS if item == "openwebtext-10k" else None),
        options.keep_duplicates,
        options.workers,
        options.tokenizer,
    )


def own(item: str, inputs: Sequence[str], options: Options, target: Path) -> Made:
    """A small known corpus, or the user's own files: in memory where that is easy, else as a collection."""
    request = Request(options.tokenizer, options.val_fraction or VAL_FRACTION_OF_FEW)
    if item:
        return prepare_few(CORPORA[item](), request, target)
    with spooled(inputs, options.text_column or options.prompt_column) as given:
        files = own_files(given)
        if options.text_column and all(kind_of(path) not in RECORD_SUFFIXES for path, _ in files):
            expected = f"files that end in {' '.join(RECORD_SUFFIXES)}"
            raise BadInput(f"--text-column {options.text_column} with plain texts", expected)
        if columns := columns_in(files, options.text_column, options.prompt_column, options.response_column):
            refused = {"--tokenizer char": options.in_characters, "--max-docs": options.max_docs is not None}
            for words, given_so in (refused | {"--split nanogpt": options.split == "nanogpt"}).items():
                if given_so:
                    raise BadInput(f"{words} has no meaning for prompts with responses", "--text-column for plain text")
            fraction = options.val_fraction or VAL_FRACTION_OF_INSTRUCTIONS
            return prepare_instructions(files, columns, fraction, options.tokenizer, target)
        in_order = options.split == "nanogpt" or options.max_docs is not None
        if options.in_characters or (is_small(files) and not in_order):
            return prepare_few(own_text(given, options.text_column, options.keep_duplicates, files), request, target)
        return prepare_many(corpus.own_collection(files), choices_of(item, options), target)


@contextmanager
def spooled(inputs: Sequence[str], column: str) -> Iterator[list[str]]:
    """The inputs, with standard input, if it is among them, as a file for the time being."""
    if STDIN not in inputs:
        yield list(inputs)
        return
    if sys.stdin is None:
        raise BadInput("standard input is closed", "a text")
    with tempfile.TemporaryDirectory(dir=make_writable(raw_dir()), prefix=".stdin-") as folder:
        path = Path(folder) / ("stdin.jsonl" if column else "stdin.txt")
        with open(path, "wb") as file:
            # Not through the buffer, whose read sees no signal between two of its own.
            while block := os.read(sys.stdin.fileno(), 1 << 20):
                file.write(block)
        with open(path, "rb") as file:
            if not column and file.read(2) == b'{"':
                say("note: standard input is taken as plain text; if these are JSON records, give --text-column NAME")
        yield [str(path) if item == STDIN else item for item in inputs]


def summary(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What a dataset is, and what it is enough for."""
    train, val = (manifest["splits"][split] for split in SPLITS)
    tokens, characters = (train[key] + val[key] for key in ("tokens", "characters"))
    lines = [
        f"{folder}: train {train['tokens']:,} tokens, val {val['tokens']:,} tokens;"
        f" vocabulary {manifest['tokenizer']['vocab_size']:,}",
        f"  documents: {documents_of(train['documents'], val['documents'])}"
        f"; the longest has {manifest.get('longest_document', 0):,} tokens",
        f"  {characters / tokens:.2f} characters a token; windows are cut from the documents in a row, none is padded",
    ]
    if "loss_on" in manifest:
        share = train["counted_tokens"] / train["tokens"]
        lines.append(f"  prompts with responses: loss on the responses alone, {share:.0%} of the tokens")
    left_out = {key: manifest.get(f"{key}_left_out", 0) for key in ("duplicates", "empty")}
    if any(left_out.values()):
        lines.append(f"  left out: {left_out['duplicates']:,} exact duplicates, {left_out['empty']:,} without text")
    if manifest["tokenizer"]["kind"] == "char":
        return lines
    for config in ("openwebtext", "finetune"):
        settings, _ = load_config(config, {})
        steps, per_step = settings.max_steps, settings.tokens_per_step
        passes = steps * per_step / train["tokens"]
        if passes > MOST_PASSES:
            continue
        read = f"read it {passes:,.{passes < 10:d}f} times" if passes >= 1 else f"read {passes:.1%} of it"
        lines.append(f"  {steps:,} steps of {per_step:,} tokens, as in the config {config}, {read}")
    if train["tokens"] < ENOUGH_TO_TUNE:
        lines.append("  very little text, which Medium soon knows by heart: watch val_loss, and give more if you can")
    elif train["tokens"] < ENOUGH_FOR_MEDIUM:
        lines.append(
            f"  too little to train Medium from scratch ({ENOUGH_FOR_MEDIUM / 1e9:.1f} billion tokens would do):"
            " fine-tune"
        )
    return lines


def documents_of(train: int, val: int) -> str:
    """How many are in each split; as many in both are the same ones."""
    if train != val:
        return f"{train:,} to train on, {val:,} to validate on"
    each = "" if train == 1 else "each "
    return f"{train:,}, {each}cut: its beginning to train on, its end to validate on"


def next_command(folder: Path, manifest: dict[str, Any]) -> str:
    """What to do with a dataset."""
    if folder.name in list_presets():
        return f"  next  gpt2box train {folder.name}"
    kind, tokens = manifest["tokenizer"]["kind"], manifest["splits"]["train"]["tokens"]
    config = "demo" if kind == "char" else "finetune" if tokens < ENOUGH_FOR_MEDIUM else "openwebtext"
    weights = " --init-from MODEL" if kind == "bpe" and config == "finetune" else ""
    return f"  next  gpt2box train {config} --dataset {folder.name}{weights}"


def verify(name: str) -> None:
    """Read a dataset once more: whether it is what was written, and every id is in the vocabulary.

    Raises:
        BadInput: no dataset, or nanoGPT's, which says nothing of itself.
        Damaged: it is not.
    """
    folder = dataset_dir(name)
    dataset = open_dataset(folder)
    manifest = read_manifest(folder)
    for split in SPLITS:
        largest = largest_id(folder / f"{split}.bin")
        if largest >= dataset.tokenizer.vocab_size:
            raise Damaged(
                f"{folder}/{split}.bin holds token id {largest:,}",
                f"ids below {dataset.tokenizer.vocab_size:,}, the vocabulary's size",
                "prepare it again",
            )
    if not manifest:
        say(f"{folder}: {dataset.tokens('train'):,} tokens, ids in range; no dataset.json to compare with")
        return
    check_content(folder, manifest)
    try:
        said = summary(folder, manifest)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise Damaged(
            f"{folder}/dataset.json is damaged ({why(error)})", "a manifest as `prepare` writes it"
        ) from error
    say("\n".join([*said, "  whole: both files hash to what dataset.json says"]))


def largest_id(path: Path) -> int:
    """Of a .bin file's token ids."""
    largest = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            largest = max(largest, int(np.frombuffer(block[: len(block) // 2 * 2], dtype="<u2").max(initial=0)))
    return largest
