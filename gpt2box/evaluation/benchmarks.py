"""HellaSwag and LAMBADA: which ending does the model find likelier, and does it know the last word.

Texts are made, cut and scored as lm-evaluation-harness does (its tasks hellaswag and lambada_openai), so that the
figures compare with published ones.

    HellaSwag   Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?"
    LAMBADA     Paperno et al. 2016; in the form that OpenAI used for GPT-2
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gpt2box.data import hub_datasets
from gpt2box.data.readers import UNREADABLE, kind_of, opened, parquet, unreadable
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.errors import BadInput, why
from gpt2box.model.gpt2 import GPT2
from gpt2box.utils.files import parse_json
from gpt2box.utils.progress import bytes_bar

BATCH_TOKENS = 8192
LARGEST_EXPONENT = 700  # of what a float holds
ON_THE_HUB = {"hellaswag": ("Rowan/hellaswag", "validation"), "lambada": ("EleutherAI/lambada_openai", "test")}


@dataclass(frozen=True)
class Answer:
    """How a model finds a continuation."""

    log_likelihood: float
    is_greedy: bool  # each of its tokens is the likeliest one


Record = tuple[list[tuple[str, str]], int]  # contexts with continuations, and which of them is right
Answered = tuple[list[tuple[Answer, int]], int]  # with the characters of each continuation


def evaluate(task: str, model: GPT2, words: Tokenizer, path: Path | None, most: int | None) -> dict[str, Any]:
    """A task's figures: on a file, or on the Hub's.

    Raises:
        BadInput: a file of another form.
        TryAgain: the Hub does not answer.
    """
    figures_of = {"hellaswag": hellaswag_figures, "lambada": lambada_figures}
    if path is None:
        name, split = ON_THE_HUB[task]
        path = hub_datasets.dataset(name, "", split, slice(0, 1), keep_raw=True)[0][0].bring()
    records = read_task(task, path, most)
    answers = iter(answers_to([pair for pairs, _ in records for pair in pairs], model, words))
    grouped = [([(next(answers), len(pair[1]) - 1) for pair in pairs], label) for pairs, label in records]
    return {"task": task, "records": len(records)} | figures_of[task](grouped)


def read_task(task: str, path: Path, most: int | None) -> list[Record]:
    """A task's records, at most so many.

    Raises:
        BadInput: a file of another form, or an empty one.
    """
    parts_of = {"hellaswag": hellaswag_parts, "lambada": lambada_parts}
    try:
        records = [parts_of[task](record) for record in islice(read(path), most)]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        expected = f"the form of {ON_THE_HUB[task][0]} on the Hub"
        raise BadInput(f"{path} is not {task}: {why(error)}", expected) from error
    if not records:
        raise BadInput(f"{path} is empty", "records")
    return records


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines or Parquet file.

    Raises:
        BadInput: of another kind.
        Damaged: it cannot be read.
    """
    kind = kind_of(path)
    if kind not in (".parquet", ".jsonl", ".ndjson"):
        raise BadInput(f"{path} ends in {kind or 'nothing'}", ".jsonl or .parquet")
    try:
        if kind == ".parquet":
            with parquet(path) as file:
                yield from file.read().to_pylist()
            return
        with opened(path) as packed, io.TextIOWrapper(packed, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip():
                        yield parse_json(line)
                except ValueError as error:
                    raise BadInput(f"{path}, line {number}: {error}", "a JSON object a line") from error
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def hellaswag_parts(record: dict[str, Any]) -> Record:
    """A context with four endings."""
    context = tidied(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
    endings, label = record["endings"], int(str(record["label"]))
    if not isinstance(endings, list) or not 0 <= label < len(endings):
        raise ValueError(f"label {label} of the endings {str(endings)[:80]}")
    return [(context, " " + tidied(ending)) for ending in endings], label


def tidied(text: str) -> str:
    """Without the marks that WikiHow's articles left in the data."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^\]\n]*\]", "", text).replace("  ", " ")


def hellaswag_figures(answered: Sequence[Answered]) -> dict[str, float]:
    """Accuracy by likelihood, and by likelihood a character of the ending."""
    right = [best([a.log_likelihood for a, _ in found]) == label for found, label in answered]
    by_length = [best([a.log_likelihood / max(n, 1) for a, n in found]) == label for found, label in answered]
    return mean("acc", right) | mean("acc_norm", by_length)


def lambada_parts(record: dict[str, Any]) -> Record:
    """A passage without its last word, and the word."""
    context, _, last = record["text"].rpartition(" ")
    return [(context, " " + last)], 0


def lambada_figures(answered: Sequence[Answered]) -> dict[str, float]:
    """Whether the last word is the likeliest, and its perplexity."""
    first = [found[0][0] for found, _ in answered]
    perplexity = math.exp(min(-statistics.fmean(answer.log_likelihood for answer in first), LARGEST_EXPONENT))
    return mean("acc", [answer.is_greedy for answer in first]) | {"perplexity": perplexity}


def best(values: list[float]) -> int:
    """The first of the largest."""
    return values.index(max(values))


def mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """With its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {name: statistics.fmean(values), f"{name}_stderr": error}


def encoded(context: str, continuation: str, words: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of both, encoded together, so that the border is the tokenizer's; spaces between go to the latter."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = words.encode(context + continuation).tolist()
    before = len(words.encode(context)) if context else 0
    if not before and words.end_of_text is not None:
        return [words.end_of_text], whole
    if not before:
        raise BadInput(
            f"nothing before {continuation[:40]!r}", "a context, as this vocabulary has no end-of-text token"
        )
    return whole[:before], whole[before:]


@torch.inference_mode()
def answers_to(pairs: Sequence[tuple[str, str]], model: GPT2, words: Tokenizer) -> list[Answer]:
    """How the model finds each continuation of its context; what is longer than its context loses its beginning."""
    device, block_size = model.wte.weight.device, model.shape.block_size
    requests = [encoded(*pair, words) for pair in pairs]
    if (longest := max(len(continuation) for _, continuation in requests)) > block_size:
        raise BadInput(f"an ending of {longest:,} tokens", f"at most {block_size:,}, the model's context")
    order = sorted(range(len(pairs)), key=lambda i: -len(requests[i][0] + requests[i][1]))  # alike beside each other
    answers: dict[int, Answer] = {}
    model.eval()
    with bytes_bar("answering", sum(len(context) + len(continuation) for context, continuation in pairs)) as advance:
        while len(answers) < len(order):
            begin = len(answers)
            longest = min(sum(map(len, requests[order[begin]])) - 1, block_size)
            chosen = order[begin : begin + max(1, BATCH_TOKENS // longest)]
            ids = torch.zeros(len(chosen), longest, dtype=torch.long)
            for row, index in enumerate(chosen):
                context, continuation = requests[index]
                inputs = (context + continuation)[-(block_size + 1) :][:-1]
                ids[row, : len(inputs)] = torch.tensor(inputs)
            hidden = model.hidden(ids.to(device))  # (B, T, C)
            for row, index in enumerate(chosen):
                context, continuation = requests[index]
                end = min(len(context) + len(continuation) - 1, block_size)
                last = hidden[row, max(0, end - len(continuation)) : end]
                answers[index] = judged(model.logits(last).float(), continuation[-len(last) :])
            advance(sum(len(pairs[i][0]) + len(pairs[i][1]) for i in chosen))
    return [answers[i] for i in range(len(pairs))]


def judged(logits: torch.Tensor, continuation: list[int]) -> Answer:
    """Logits (n, V) of the places of n tokens."""
    wanted = torch.tensor(continuation, device=logits.device)
    of_wanted = logits.log_softmax(-1).gather(1, wanted[:, None])
    return Answer(float(of_wanted.sum()), bool((logits.argmax(-1) == wanted).all()))
