"""Prepare prompts with responses as a dataset whose loss is on the responses alone.

Each pair becomes a document: the prompt in `TEMPLATE`, the response, end of text. Beside each .bin file lies a .mask
file, a byte a token: 1 where the token is part of a response (or ends it), and so a target that counts.
"""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.data import downloads
from gpt2box.data.bulk_tokenizer import BulkEncoder, resolve_source
from gpt2box.data.dataset import FORMAT, SPLITS
from gpt2box.data.dataset_folder import SPLIT_SEED, PreparedDataset, describe_splits, publish_dataset
from gpt2box.data.readers import file_kind, read_column_names, read_documents, split_into_units
from gpt2box.data.sources import fingerprint
from gpt2box.data.tokenizer import Tokens, tokenizer_identity
from gpt2box.errors import BadInput
from gpt2box.utils.paths import RECORD_SUFFIXES
from gpt2box.utils.progress import byte_progress

# Of Stanford Alpaca (Taori et al. 2023), without its preamble: what follows the last line is the response.
TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
KNOWN_COLUMN_PAIRS = [
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
]
CONTEXT_COLUMNS = ("input", "context")  # of Alpaca and Dolly: what the instruction is about; may be empty


@dataclass(frozen=True)
class Columns:
    """Name the columns of a record."""

    prompt: str
    response: str
    contexts: tuple[str, ...] = ()


def find_columns(files: list[tuple[Path, str]], text: str, prompt: str, response: str) -> Columns | None:
    """Find the columns of prompts and responses, as requested or by their known names; None if there are none.

    Raises BadInput: one of the two without the other, one column for both, or files that have no columns.
    """
    if bool(prompt) != bool(response):
        raise BadInput("one of --prompt-column and --response-column without the other", "both, or neither")
    if prompt and prompt == response:
        raise BadInput(f"--prompt-column and --response-column are both {prompt}", "two columns")
    of_records = all(file_kind(path) in RECORD_SUFFIXES for path, _ in files)
    if prompt and not of_records:
        raise BadInput("--prompt-column with a plain text", f"files that end in {' '.join(RECORD_SUFFIXES)}")
    if text or not of_records or not files:
        return None
    names = read_column_names(files[0][0])
    found = next((pair for pair in KNOWN_COLUMN_PAIRS if set(pair) <= set(names)), None)
    if not prompt and (found is None or "text" in names):
        return None
    return Columns(prompt, response) if prompt else Columns(*(found or ("", "")), CONTEXT_COLUMNS)


def prepare_instructions(
    files: list[tuple[Path, str]], columns: Columns, val_fraction: float, words: str, folder: Path
) -> PreparedDataset:
    """Make the dataset in `folder` unless it exists with the same files and choices.

    `words`: gpt2, or the folder of another tokenizer.

    Raises:
        BadInput: too few pairs, or files that are not as they should be.
        VolumeUnwritable: no space or no permission.
    """
    identity = {
        "format": FORMAT,
        "source": ", ".join(str(path) for path, _ in files[:20]) + (", …" if len(files) > 20 else ""),
        "documents": [fingerprint(path, name) for path, name in files],
        "split": {"val_fraction": val_fraction, "seed": SPLIT_SEED},
        "loss_on": "responses",
        "template": TEMPLATE,
        "columns": [columns.prompt, columns.response, *columns.contexts],
    }
    if words != "gpt2":
        identity["tokenizer_digest"] = tokenizer_identity(words)
    return publish_dataset(
        folder,
        identity,
        lambda beside: write_instructions(files, columns, val_fraction, words, beside),
        resumable=False,
    )


def read_pairs(path: Path, name: str, columns: Columns) -> Iterator[tuple[str, str]]:
    """Yield the prompts and responses of a file, read once for each column. A record may have a context."""

    def column(wanted: str, may_lack: bool = False) -> Iterator[str]:
        units = (replace(unit, may_lack=may_lack) for unit in split_into_units(path, name, wanted))
        return ("".join(parts) for unit in units for parts in read_documents(unit))

    of_objects = file_kind(path) in (".json", ".jsonl", ".ndjson")  # of the others, a file's records are all alike
    there = [context for context in columns.contexts if of_objects or context in read_column_names(path)]
    read = [column(columns.prompt), column(columns.response), *(column(context, may_lack=True) for context in there)]
    for prompt, response, *contexts in zip(*read, strict=True):
        yield "\n\n".join([prompt, *(context for context in contexts if context.strip())]), response


def write_instructions(
    files: list[tuple[Path, str]], columns: Columns, val_fraction: float, asked: str, folder: Path
) -> dict[str, Any]:
    """Write .bin and .mask files and the tokenizer into `folder`; return their part of the manifest."""
    source, words = resolve_source(asked)
    bulk = BulkEncoder(source)
    (folder / "tokenizer").mkdir()
    words.save(folder / "tokenizer")
    documents: dict[tuple[str, str], tuple[Tokens, int]] = {}  # ids, and how many of them are the prompt's
    empty = duplicates = 0
    with byte_progress("tokenising", sum(path.stat().st_size for path, _ in files)) as advance:
        for path, name in files:
            for pair in read_pairs(path, name, columns):
                empty += not pair[1].strip()
                duplicates += pair in documents
                if pair[1].strip() and pair not in documents:
                    documents[pair] = encode_pair(pair, bulk, words.end_of_text)
            advance(path.stat().st_size)
    figures = {"duplicates": duplicates, "empty": empty}
    figures["longest"] = max((len(ids) for ids, _ in documents.values()), default=0)
    order = list(documents)
    random.Random(SPLIT_SEED).shuffle(order)
    held_out = max(1, round(len(order) * val_fraction))
    for split, chosen in zip(SPLITS, (order[held_out:], order[:held_out]), strict=True):
        figures |= {
            f"{split} documents": len(chosen),
            f"{split} characters": sum(len(format_prompt(p)) + len(r) for p, r in chosen),
        }
        of_split = [documents[pair] for pair in chosen]
        with open(folder / f"{split}.bin", "wb") as tokens, open(folder / f"{split}.mask", "wb") as mask:
            for ids, of_prompt in of_split:
                tokens.write(ids.astype("<u2").tobytes())
                mask.write((np.arange(len(ids)) >= of_prompt).tobytes())
            for file in (tokens, mask):
                file.flush()
                os.fsync(file.fileno())
    manifest = describe_splits(folder, words, figures)
    for split in SPLITS:
        path = folder / f"{split}.mask"
        counted = int(np.fromfile(path, dtype=np.uint8).sum())
        manifest["splits"][split] |= {"counted_tokens": counted, "mask_sha256": downloads.sha256_of(path)}
    return manifest


def format_prompt(prompt: str) -> str:
    """Format a prompt with the template."""
    return TEMPLATE.format(prompt=prompt)


def encode_pair(pair: Sequence[str], bulk: BulkEncoder, end_of_text: int | None) -> tuple[Tokens, int]:
    """Return a document's ids, and how many are the prompt's. Both are encoded apart, as in generation."""
    before, after = (np.concatenate(list(bulk.encode((text,)))) for text in (format_prompt(pair[0]), pair[1]))
    return np.concatenate([before, after, np.array([end_of_text])]).astype(np.uint16), len(before)
