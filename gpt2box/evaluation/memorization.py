"""What a run made of its text: the same prompt before and after, and what of the training text it knows by heart."""

from __future__ import annotations

import io
import json
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt2box.data.dataset import Dataset, TokenFile
from gpt2box.data.tokenizer import Tokens, prompt_ids
from gpt2box.model.decoder import Decoder
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.sampling import Choice, generate
from gpt2box.utils.files import read_json, read_text, write_atomically

SAMPLES = 4
SEARCHED_TOKENS = 100_000_000  # of the training text, from its beginning: some seconds
BLOCK_TOKENS = 1 << 22
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
RECITED_TOKENS = 50  # the usual length from which a verbatim copy counts as memorised (Carlini et al. 2022)


@dataclass(frozen=True)
class ByHeart:
    """The longest verbatim overlap of samples with the training text, beside that of text the run did not train on."""

    step: int  # of the weights that wrote the samples
    sampled_tokens: int
    searched_tokens: int  # of the training text
    overlap_tokens: int
    overlap: str
    unseen_overlap_tokens: int  # of as much validation text

    @property
    def recites(self) -> bool:
        """Much longer than what unseen text shares with the training text by itself."""
        return self.overlap_tokens >= max(RECITED_TOKENS, 2 * self.unseen_overlap_tokens)

    def words(self) -> str:
        """For the report."""
        excerpt = " ".join(self.overlap.split())
        excerpt = excerpt if len(excerpt) <= 60 else excerpt[:57] + "…"
        verdict = "; it recites: give more text, or fewer steps" if self.recites else ""
        return (
            f"at most {self.overlap_tokens} tokens in a row as in the training text ({excerpt!r}); "
            f"unseen text has {self.unseen_overlap_tokens}{verdict}"
        )


def by_heart(run: Path, model: GPT2, dataset: Dataset, prompt: str, length: int, seed: int, step: int) -> ByHeart:
    """Sample from the model, search the training text for what it wrote; writes memorisation.json and the samples."""
    words = dataset.tokenizer
    ids = prompt_ids(words, prompt)
    decoder = Decoder(model)
    outputs = (list(generate(decoder, ids, length, Choice(), seed + i)) for i in range(SAMPLES))
    written: list[Tokens] = [np.array(output, dtype=np.uint16) for output in outputs]
    with closing(TokenFile(dataset.folder / "val.bin")) as val:
        count = min(length, val.tokens // SAMPLES)
        unseen = [val.read(i * (val.tokens // SAMPLES), count) for i in range(SAMPLES)]
    train = dataset.folder / "train.bin"
    found, unseen_found = longest_overlap(written, train), longest_overlap(unseen, train)
    result = ByHeart(
        step,
        sum(map(len, written)),
        min(dataset.tokens("train"), SEARCHED_TOKENS),
        len(found),
        words.decode_bytes(found.tolist()).decode("utf-8", errors="replace"),
        len(unseen_found),
    )
    texts = [prompt + words.decode_bytes(part.tolist()).decode("utf-8", errors="replace") for part in written]
    write_atomically(run / "samples" / "best.txt", "\n---------------\n".join(texts) + "\n")
    write_atomically(run / "memorisation.json", json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n")
    return result


def read_by_heart(run: Path, step: int) -> ByHeart | None:
    """What was found for the weights of that step, if it was looked for."""
    try:
        found = ByHeart(**read_json(run / "memorisation.json"))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.step == step else None


def longest_overlap(texts: list[Tokens], path: Path) -> Tokens:
    """The longest run of ids of any of the texts that is in a .bin file's first SEARCHED_TOKENS, too; may be empty."""
    best: Tokens = np.empty(0, dtype=np.uint16)
    longest = max(map(len, texts), default=0)
    with closing(TokenFile(path)) as file:
        end = min(file.tokens, SEARCHED_TOKENS)
        for begin in range(0, end, BLOCK_TOKENS):
            block = file.read(begin, min(BLOCK_TOKENS + longest, end - begin))
            best = longer_in_block(texts, block, best)
    return best


def longer_in_block(texts: list[Tokens], block: Tokens, best: Tokens) -> Tokens:
    """A longer common run than `best`, the longest there is in this block, or `best`.

    A common run of n ids holds one of n - 1, so the longest is found by halving.
    """
    sums = prefix_sums(block)
    prefixes = [prefix_sums(text) for text in texts]
    low, high = len(best), min(len(block), max(map(len, texts)))
    step = 1  # most blocks hold nothing longer: look close by first
    while low < high:
        length = min(low + step, high)
        if (found := common(texts, prefixes, block, sums, length)) is None:
            high = length - 1
            step = max((high - low) // 2, 1)
        else:
            best, low = found, length
            step *= 2
    return best


def common(
    texts: list[Tokens],
    prefixes: list[npt.NDArray[np.uint64]],
    block: Tokens,
    sums: npt.NDArray[np.uint64],
    length: int,
) -> Tokens | None:
    """A run of `length` ids that is in a text and in the block."""
    hashes = np.concatenate([window_hashes(prefix, length) for prefix in prefixes])
    runs: list[Tokens] = [text[i : i + length] for text in texts for i in range(len(text) - length + 1)]
    order = hashes.argsort(kind="stable")
    hashes = hashes[order]
    of_block = window_hashes(sums, length)
    place = np.minimum(np.searchsorted(hashes, of_block), len(hashes) - 1)
    for start in np.flatnonzero(hashes[place] == of_block):
        run: Tokens = runs[order[place[start]]]
        if np.array_equal(run, block[start : start + length]):  # hashes can agree by chance
            return run
    return None


def prefix_sums(ids: Tokens) -> npt.NDArray[np.uint64]:
    """Σ id · BASE^i of the first 0, 1, … n ids, modulo 2^64."""
    powers = np.full(len(ids), BASE).cumprod(dtype=np.uint64)
    return np.concatenate([np.zeros(1, np.uint64), ((ids.astype(np.uint64) + np.uint64(1)) * powers).cumsum()])


def window_hashes(sums: npt.NDArray[np.uint64], length: int) -> npt.NDArray[np.uint64]:
    """Of each `length` ids in a row, the same wherever they stand (Karp and Rabin 1987)."""
    count = max(len(sums) - length, 0)
    inverse = np.uint64(pow(int(BASE), -1, 1 << 64))
    hashes: npt.NDArray[np.uint64] = (sums[length : length + count] - sums[:count]) * np.full(count, inverse).cumprod(
        dtype=np.uint64
    )
    return hashes


def side_by_side(run: Path, best_step: int, width: int = 110) -> str:
    """The samples before the first step and of the best one, in two columns; also samples/before-after.txt."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    before, after = (run / "samples" / f"step-{step:08d}.txt" for step in (0, best_step))
    if best_step == 0 or not (before.exists() and after.exists()):
        return ""
    table = Table(box=box.SIMPLE_HEAD, width=width)
    for title in ("before", f"after {best_step:,} steps"):
        table.add_column(title, ratio=1)
    table.add_row(*(Text(read_text(path).strip()) for path in (before, after)))
    lines = io.StringIO()
    Console(file=lines, width=width, color_system=None).print(table)
    text = "\n".join(line.rstrip() for line in lines.getvalue().strip("\n").splitlines())
    write_atomically(run / "samples" / "before-after.txt", text + "\n")
    return text
