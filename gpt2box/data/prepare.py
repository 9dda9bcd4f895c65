"""Prepare, summarize and verify datasets (`gpt2box prepare`)."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.config.loader import list_presets, load_config
from gpt2box.data import corpus, hub_models
from gpt2box.data.dataset import SPLITS, open_dataset
from gpt2box.data.dataset_folder import PreparedDataset, check_content, read_manifest
from gpt2box.data.instructions import find_columns, prepare_instructions
from gpt2box.data.prepare_config import PrepareConfig, load_cached_tokenizer
from gpt2box.data.prepare_corpus import prepare_corpus
from gpt2box.data.prepare_texts import prepare_texts
from gpt2box.data.readers import file_kind
from gpt2box.data.sources import CORPORA, KNOWN_CORPORA, OPENWEBTEXT, find_files, is_small, load_texts
from gpt2box.errors import BadInput, Damaged, describe_error
from gpt2box.utils.paths import RECORD_SUFFIXES, dataset_dir, ensure_writable, raw_dir, slugify, stem_of, validate_name
from gpt2box.utils.progress import log_line

HUB = "hub:"
STDIN = "-"
SLICE_DOCUMENTS = 10_000  # openwebtext-10k
TEXTS_VAL_FRACTION, CORPUS_VAL_FRACTION, INSTRUCTIONS_VAL_FRACTION = 0.1, 0.01, 0.05
# Twenty tokens a parameter (Hoffmann et al. 2022), of which four passes over the same text are nearly as good as fresh
# text (Muennighoff et al. 2023).
MEDIUM_MIN_TOKENS = 355_000_000 * 20 // 4
FINETUNE_MIN_TOKENS = 100_000
MAX_REPORTED_PASSES = 1000  # over a text, of which there is a point in speaking


def prepare(
    inputs: Sequence[str], config: PrepareConfig, name: str | None = None, folder: Path | None = None
) -> PreparedDataset:
    """Make a dataset from the inputs and log its summary.

    It goes to `folder` if given, else to volumes/data under `name`, else under a name derived from the inputs.

    Raises:
        BadInput: invalid inputs or choices, or choices that do not go together.
        Damaged, TryAgain, VolumeUnwritable: files, network or disk failed.
    """
    item = find_known_corpus(inputs)
    asked, config = config.tokenizer, replace(config, tokenizer=resolve_tokenizer(config.tokenizer))
    check_options(item, config)
    usual = default_dataset_name(inputs[0], replace(config, tokenizer="gpt2" if config.tokenizer == "gpt2" else asked))
    target = folder or dataset_dir(validate_name(name or usual, "dataset"))
    if item in OPENWEBTEXT or item.startswith(HUB):
        made = prepare_corpus(open_file_corpus(item, config), resolve_config(item, config), target)
    else:
        made = prepare_own_files(item, inputs, config, target)
    manifest, written = made
    if not written:
        log_line("nothing to do: it is there already, made from the same text")
    log_line("\n".join([*summarize_dataset(target, manifest), *([] if folder else [next_command(target, manifest)])]))
    return made


def resolve_tokenizer(asked: str) -> str:
    """Resolve --tokenizer to gpt2, char or a folder; GPT-2's own tokenizer in a folder resolves to gpt2.

    Raises:
        BadInput: no such tokenizer.
        TryAgain: the Hub does not answer.
    """
    if asked in ("gpt2", "char"):
        return asked
    folder = Path(asked)
    if not folder.is_dir():
        if not hub_models.HUB_NAME.fullmatch(asked):
            raise BadInput(f"--tokenizer {asked}", "gpt2, char, the folder of a tokenizer, or OWNER/NAME of the Hub")
        folder = hub_models.hub_tokenizer(asked)
    return "gpt2" if load_cached_tokenizer(folder).kind == "gpt2" else str(folder)


def find_known_corpus(inputs: Sequence[str]) -> str:
    """Return the input that names a known corpus or a Hub dataset, or an empty string.

    Raises BadInput: with others beside it.
    """
    known = [item for item in inputs if item in KNOWN_CORPORA or item.startswith(HUB)]
    if known and len(inputs) > 1:
        raise BadInput(f"{known[0]} together with other inputs", "one known corpus, or files and folders of your own")
    if known and known[0] == HUB:
        raise BadInput(f"no dataset after {HUB}", f"{HUB}OWNER/NAME")
    return known[0] if known else ""


def default_dataset_name(first: str, config: PrepareConfig) -> str:
    """Return the dataset name derived from the first input and the choices."""
    if first.startswith(HUB):
        title = "-".join(filter(None, [first.removeprefix(HUB), config.hub_config, config.hub_split]))
    else:
        title = first if first in KNOWN_CORPORA else "stdin" if first == STDIN else stem_of(Path(first))
    parts = [slugify(title)]
    parts += [slugify(Path(config.tokenizer.partition("@")[0]).name)] if config.tokenizer != "gpt2" else []
    parts += list(map(str, config.shards or ()))
    parts += ["first", str(config.max_docs)] if config.max_docs else []
    return "-".join(parts)


def check_options(item: str, config: PrepareConfig) -> None:
    """Check that every given option applies to this kind of input. Raises BadInput: one does not."""
    kind = "hub" if item.startswith(HUB) else "openwebtext" if item in OPENWEBTEXT else "corpus" if item else "own"
    given = {name for name, value in vars(config).items() if value != getattr(PrepareConfig(), name)}
    for_all = {"tokenizer", "val_fraction"}
    for_many = for_all | {"text_column", "split", "max_docs", "keep_duplicates", "workers"}
    in_files = {"shards", "keep_raw"}
    allowed = {
        "corpus": for_all,
        "own": for_many | {"prompt_column", "response_column"},
        "openwebtext": for_many | in_files | {"folder"},
        "hub": for_many | in_files | {"hub_config", "hub_split"},
    }[kind]
    if config.is_character_level:
        allowed -= {"max_docs", "split"} | ({"tokenizer"} if kind in ("openwebtext", "hub") else set())
    if wrong := sorted(given - allowed):
        flag = "from" if wrong[0] == "folder" else wrong[0].replace("_", "-")
        of = item or "files" + (" in characters" if config.is_character_level else "")
        raise BadInput(f"--{flag} has no meaning for {of}", "see gpt2box prepare --help")


def open_file_corpus(item: str, config: PrepareConfig) -> corpus.FileCorpus:
    """Open OpenWebText or a dataset of the Hub."""
    shards = config.shards or ((0, 1) if item == "openwebtext-10k" else None)
    files = slice(*shards) if shards else slice(None)
    if item in OPENWEBTEXT:
        return corpus.open_openwebtext(config.folder, files, config.keep_raw)
    split = config.hub_split or "train"
    return corpus.open_hub_dataset(item.removeprefix(HUB), config.hub_config, split, files, config.keep_raw)


def resolve_config(item: str, config: PrepareConfig) -> PrepareConfig:
    """Fill in the defaults of a corpus that is read file by file."""
    max_docs = config.max_docs or (SLICE_DOCUMENTS if item == "openwebtext-10k" else None)
    val_fraction = config.val_fraction or OPENWEBTEXT.get(item, CORPUS_VAL_FRACTION)
    return replace(config, val_fraction=val_fraction, max_docs=max_docs)


def prepare_own_files(item: str, inputs: Sequence[str], config: PrepareConfig, target: Path) -> PreparedDataset:
    """Prepare a small known corpus or the user's files: in memory if they are small, else file by file."""
    text_config = replace(config, val_fraction=config.val_fraction or TEXTS_VAL_FRACTION)
    if item:
        return prepare_texts(CORPORA[item](), text_config, target)
    with spool_stdin(inputs, config.text_column or config.prompt_column) as given:
        files = find_files(given)
        if config.text_column and all(file_kind(path) not in RECORD_SUFFIXES for path, _ in files):
            expected = f"files that end in {' '.join(RECORD_SUFFIXES)}"
            raise BadInput(f"--text-column {config.text_column} with plain texts", expected)
        if columns := find_columns(files, config.text_column, config.prompt_column, config.response_column):
            refused = {"--tokenizer char": config.is_character_level, "--max-docs": config.max_docs is not None}
            for words, given_so in (refused | {"--split nanogpt": config.split == "nanogpt"}).items():
                if given_so:
                    raise BadInput(f"{words} has no meaning for prompts with responses", "--text-column for plain text")
            fraction = config.val_fraction or INSTRUCTIONS_VAL_FRACTION
            return prepare_instructions(files, columns, fraction, config.tokenizer, target)
        in_order = config.split == "nanogpt" or config.max_docs is not None
        if config.is_character_level or (is_small(files) and not in_order):
            return prepare_texts(
                load_texts(given, config.text_column, config.keep_duplicates, files), text_config, target
            )
        return prepare_corpus(corpus.open_own_files(files), resolve_config(item, config), target)


@contextmanager
def spool_stdin(inputs: Sequence[str], column: str) -> Iterator[list[str]]:
    """Yield the inputs, with standard input replaced by a temporary file."""
    if STDIN not in inputs:
        yield list(inputs)
        return
    if sys.stdin is None:
        raise BadInput("standard input is closed", "a text")
    with tempfile.TemporaryDirectory(dir=ensure_writable(raw_dir()), prefix=".stdin-") as folder:
        path = Path(folder) / ("stdin.jsonl" if column else "stdin.txt")
        with open(path, "wb") as file:
            # Not through the buffer, whose read sees no signal between two of its own.
            while block := os.read(sys.stdin.fileno(), 1 << 20):
                file.write(block)
        with open(path, "rb") as file:
            if not column and file.read(2) == b'{"':
                log_line(
                    "note: standard input is taken as plain text; if these are JSON records, give --text-column NAME"
                )
        yield [str(path) if item == STDIN else item for item in inputs]


def summarize_dataset(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Describe a dataset's size and what it is enough for."""
    train, val = (manifest["splits"][split] for split in SPLITS)
    tokens, characters = (train[key] + val[key] for key in ("tokens", "characters"))
    lines = [
        f"{folder}: train {train['tokens']:,} tokens, val {val['tokens']:,} tokens;"
        f" vocabulary {manifest['tokenizer']['vocab_size']:,}",
        f"  documents: {describe_documents(train['documents'], val['documents'])}"
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
        if passes > MAX_REPORTED_PASSES:
            continue
        read = f"read it {passes:,.{passes < 10:d}f} times" if passes >= 1 else f"read {passes:.1%} of it"
        lines.append(f"  {steps:,} steps of {per_step:,} tokens, as in the config {config}, {read}")
    if train["tokens"] < FINETUNE_MIN_TOKENS:
        lines.append("  very little text, which Medium soon knows by heart: watch val_loss, and give more if you can")
    elif train["tokens"] < MEDIUM_MIN_TOKENS:
        lines.append(
            f"  too little to train Medium from scratch ({MEDIUM_MIN_TOKENS / 1e9:.1f} billion tokens would do):"
            " fine-tune"
        )
    return lines


def describe_documents(train: int, val: int) -> str:
    """Describe the number of documents in each split; equal counts mean that each document was cut."""
    if train != val:
        return f"{train:,} to train on, {val:,} to validate on"
    each = "" if train == 1 else "each "
    return f"{train:,}, {each}cut: its beginning to train on, its end to validate on"


def next_command(folder: Path, manifest: dict[str, Any]) -> str:
    """Return the command that trains on a dataset."""
    if folder.name in list_presets():
        return f"  next  gpt2box train {folder.name}"
    kind, tokens = manifest["tokenizer"]["kind"], manifest["splits"]["train"]["tokens"]
    config = "demo" if kind == "char" else "finetune" if tokens < MEDIUM_MIN_TOKENS else "openwebtext"
    weights = " --init-from MODEL" if kind == "bpe" and config == "finetune" else ""
    return f"  next  gpt2box train {config} --dataset {folder.name}{weights}"


def verify_dataset(name: str) -> None:
    """Verify a dataset's checksums, and that every id is in the vocabulary.

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
        log_line(f"{folder}: {dataset.tokens('train'):,} tokens, ids in range; no dataset.json to compare with")
        return
    check_content(folder, manifest)
    try:
        said = summarize_dataset(folder, manifest)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise Damaged(
            f"{folder}/dataset.json is damaged ({describe_error(error)})", "a manifest as `prepare` writes it"
        ) from error
    log_line("\n".join([*said, "  whole: both files hash to what dataset.json says"]))


def largest_id(path: Path) -> int:
    """Return the largest token id in a .bin file."""
    largest = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            largest = max(largest, int(np.frombuffer(block[: len(block) // 2 * 2], dtype="<u2").max(initial=0)))
    return largest
