"""Show what a run learned: samples before and after training, and how much of the training text it recites verbatim."""

import io
import json
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt2box.data.dataset import Dataset, TokenFile
from gpt2box.data.tokenizer import Tokens, encode_prompt
from gpt2box.model.decoder import Decoder
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.sampling import SamplingParams, generate
from gpt2box.utils.files import read_json, read_text, write_atomically

SAMPLES = 4
SEARCHED_TOKENS = 100_000_000  # from the start of the training text; searching them takes some seconds
BLOCK_TOKENS = 1 << 22
HASH_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
RECITED_TOKENS = 50  # the usual length from which a verbatim copy counts as memorized (Carlini et al. 2022)


@dataclass(frozen=True)
class Memorization:
    """Longest verbatim overlap of samples with the training text; the keys of memorisation.json.

    Validation text of the same length gives the baseline: unseen text overlaps with the training text, too.
    """

    step: int  # of the sampled weights
    sampled_tokens: int
    searched_tokens: int  # of the training text
    overlap_tokens: int
    overlap: str
    unseen_overlap_tokens: int  # overlap of the validation text

    @property
    def recites(self) -> bool:
        """Tell if the overlap is long, and much longer than the baseline."""
        return self.overlap_tokens >= max(RECITED_TOKENS, 2 * self.unseen_overlap_tokens)

    def describe(self) -> str:
        """Return one line for the run's summary."""
        excerpt = " ".join(self.overlap.split())
        excerpt = excerpt if len(excerpt) <= 60 else excerpt[:57] + "…"
        verdict = "; it recites: give more text, or fewer steps" if self.recites else ""
        return (
            f"at most {self.overlap_tokens} tokens in a row as in the training text ({excerpt!r}); "
            f"unseen text has {self.unseen_overlap_tokens}{verdict}"
        )


def measure_memorization(
    run: Path, model: GPT2, dataset: Dataset, prompt: str, length: int, seed: int, step: int
) -> Memorization:
    """Sample from the model and search the training text for the longest verbatim overlap.

    Writes memorisation.json and samples/best.txt to the run folder.
    """
    tokenizer = dataset.tokenizer
    ids = encode_prompt(tokenizer, prompt)
    decoder = Decoder(model)
    outputs = (list(generate(decoder, ids, length, SamplingParams(), seed + i)) for i in range(SAMPLES))
    samples: list[Tokens] = [np.array(output, dtype=np.uint16) for output in outputs]
    with closing(TokenFile(dataset.folder / "val.bin")) as val:
        count = min(length, val.tokens // SAMPLES)
        unseen = [val.read(i * (val.tokens // SAMPLES), count) for i in range(SAMPLES)]
    train = dataset.folder / "train.bin"
    overlap, unseen_overlap = longest_overlap(samples, train), longest_overlap(unseen, train)

    def decode(tokens: Tokens) -> str:
        return tokenizer.decode_bytes(tokens.tolist()).decode("utf-8", errors="replace")

    result = Memorization(
        step=step,
        sampled_tokens=sum(map(len, samples)),
        searched_tokens=min(dataset.tokens("train"), SEARCHED_TOKENS),
        overlap_tokens=len(overlap),
        overlap=decode(overlap),
        unseen_overlap_tokens=len(unseen_overlap),
    )
    texts = [prompt + decode(sample) for sample in samples]
    write_atomically(run / "samples" / "best.txt", "\n---------------\n".join(texts) + "\n")
    write_atomically(run / "memorisation.json", json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n")
    return result


def read_memorization(run: Path, step: int) -> Memorization | None:
    """Read memorisation.json; return None if it is missing, damaged, or of another step."""
    try:
        result = Memorization(**read_json(run / "memorisation.json"))
    except (OSError, ValueError, TypeError):
        return None
    return result if result.step == step else None


def longest_overlap(texts: list[Tokens], path: Path) -> Tokens:
    """Return the longest id sequence, maybe empty, that a text shares with the first SEARCHED_TOKENS of a .bin file."""
    best: Tokens = np.empty(0, dtype=np.uint16)
    longest_text = max(map(len, texts), default=0)
    with closing(TokenFile(path)) as file:
        end = min(file.tokens, SEARCHED_TOKENS)
        for begin in range(0, end, BLOCK_TOKENS):
            block = file.read(begin, min(BLOCK_TOKENS + longest_text, end - begin))
            best = find_longer_overlap(texts, block, best)
    return best


def find_longer_overlap(texts: list[Tokens], block: Tokens, best: Tokens) -> Tokens:
    """Return the longest id sequence common to a text and the block, or `best` if none is longer than that.

    A common sequence of n ids contains one of n - 1, so a binary search over the length finds the longest.
    """
    sums = prefix_sums(block)
    prefixes = [prefix_sums(text) for text in texts]
    low, high = len(best), min(len(block), max(map(len, texts)))
    step = 1  # most blocks hold nothing longer than `best`, so probe short lengths first
    while low < high:
        length = min(low + step, high)
        if (common := find_common(texts, prefixes, block, sums, length)) is None:
            high = length - 1
            step = max((high - low) // 2, 1)
        else:
            best, low = common, length
            step *= 2
    return best


def find_common(
    texts: list[Tokens],
    prefixes: list[npt.NDArray[np.uint64]],
    block: Tokens,
    sums: npt.NDArray[np.uint64],
    length: int,
) -> Tokens | None:
    """Return a sequence of `length` ids that occurs in a text and in the block, or None."""
    hashes = np.concatenate([window_hashes(prefix, length) for prefix in prefixes])
    sequences: list[Tokens] = [text[i : i + length] for text in texts for i in range(len(text) - length + 1)]
    order = hashes.argsort(kind="stable")
    hashes = hashes[order]
    block_hashes = window_hashes(sums, length)
    index = np.minimum(np.searchsorted(hashes, block_hashes), len(hashes) - 1)
    for start in np.flatnonzero(hashes[index] == block_hashes):
        sequence: Tokens = sequences[order[index[start]]]
        if np.array_equal(sequence, block[start : start + length]):  # rules out hash collisions
            return sequence
    return None


def prefix_sums(ids: Tokens) -> npt.NDArray[np.uint64]:
    """Return Σ id · HASH_BASE^i over the first 0, 1, … n ids, modulo 2^64."""
    powers = np.full(len(ids), HASH_BASE).cumprod(dtype=np.uint64)
    return np.concatenate([np.zeros(1, np.uint64), ((ids.astype(np.uint64) + np.uint64(1)) * powers).cumsum()])


def window_hashes(sums: npt.NDArray[np.uint64], length: int) -> npt.NDArray[np.uint64]:
    """Return the rolling hash of every `length` consecutive ids (Karp and Rabin 1987)."""
    count = max(len(sums) - length, 0)
    inverse = np.uint64(pow(int(HASH_BASE), -1, 1 << 64))
    hashes: npt.NDArray[np.uint64] = (sums[length : length + count] - sums[:count]) * np.full(count, inverse).cumprod(
        dtype=np.uint64
    )
    return hashes


def show_before_and_after(run: Path, best_step: int, width: int = 110) -> str:
    """Return the samples of step 0 and of the best step in two columns; also writes samples/before-after.txt."""
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
