"""Run the benchmarks HellaSwag and LAMBADA.

Texts are built, truncated and scored like lm-evaluation-harness's tasks hellaswag and lambada_openai, so that the
results compare with published ones.

    HellaSwag   pick the likeliest of four endings; Zellers et al. 2019, arXiv 1905.07830
    LAMBADA     predict the last word of a passage; Paperno et al. 2016, in the form that OpenAI used for GPT-2
"""

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
from gpt2box.data.readers import UNREADABLE, file_kind, open_file, open_parquet, unreadable_error
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.errors import BadInput, describe_error
from gpt2box.evaluation.perplexity import BATCH_TOKENS, bounded_exp
from gpt2box.model.gpt2 import GPT2
from gpt2box.utils.files import parse_json
from gpt2box.utils.progress import byte_progress

HUB_DATASETS = {"hellaswag": ("Rowan/hellaswag", "validation"), "lambada": ("EleutherAI/lambada_openai", "test")}


@dataclass(frozen=True)
class Score:
    """Score of a continuation under the model."""

    log_likelihood: float
    is_greedy: bool  # greedy decoding would produce exactly this continuation


Question = tuple[list[tuple[str, str]], int]  # (context, continuation) pairs, and the index of the correct one
ScoredQuestion = tuple[list[tuple[Score, int]], int]  # (score, characters of the continuation) pairs, and that index


def run_benchmark(task: str, model: GPT2, tokenizer: Tokenizer, path: Path | None, limit: int | None) -> dict[str, Any]:
    """Run a benchmark on the records in `path`, or on the Hub's dataset if it is None; return the metrics.

    Raises:
        BadInput: The file does not have the benchmark's format.
        TryAgain: The Hub does not answer.
    """
    compute_metrics = {"hellaswag": hellaswag_metrics, "lambada": lambada_metrics}
    if path is None:
        name, split = HUB_DATASETS[task]
        path = hub_datasets.list_hub_dataset(name, "", split, slice(0, 1), keep_raw=True)[0][0].fetch()
    questions = read_questions(task, path, limit)
    scores = iter(score_continuations([pair for pairs, _ in questions for pair in pairs], model, tokenizer))
    scored = [([(next(scores), len(pair[1]) - 1) for pair in pairs], label) for pairs, label in questions]
    return {"task": task, "records": len(questions)} | compute_metrics[task](scored)


def read_questions(task: str, path: Path, limit: int | None) -> list[Question]:
    """Read a benchmark's questions, at most `limit`.

    Raises BadInput: the file does not have the benchmark's format, or is empty.
    """
    parse = {"hellaswag": hellaswag_question, "lambada": lambada_question}
    try:
        questions = [parse[task](record) for record in islice(read_records(path), limit)]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        expected = f"the format of {HUB_DATASETS[task][0]} on the Hub"
        raise BadInput(f"{path} is not {task}: {describe_error(error)}", expected) from error
    if not questions:
        raise BadInput(f"{path} is empty", "records")
    return questions


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines or Parquet file.

    Raises:
        BadInput: The file has another type.
        Damaged: The file cannot be read.
    """
    kind = file_kind(path)
    if kind not in (".parquet", ".jsonl", ".ndjson"):
        raise BadInput(f"{path} ends in {kind or 'nothing'}", ".jsonl or .parquet")
    try:
        if kind == ".parquet":
            with open_parquet(path) as file:
                yield from file.read().to_pylist()
            return
        with open_file(path) as packed, io.TextIOWrapper(packed, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip():
                        yield parse_json(line)
                except ValueError as error:
                    raise BadInput(f"{path}, line {number}: {error}", "one JSON object per line") from error
    except UNREADABLE as error:
        raise unreadable_error(path, error) from error


def hellaswag_question(record: dict[str, Any]) -> Question:
    """Build a question from a HellaSwag record: one context with four endings."""
    context = clean_wikihow(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
    endings, label = record["endings"], int(str(record["label"]))
    if not isinstance(endings, list) or not 0 <= label < len(endings):
        raise ValueError(f"label {label} of the endings {str(endings)[:80]}")
    return [(context, " " + clean_wikihow(ending)) for ending in endings], label


def clean_wikihow(text: str) -> str:
    """Remove the markup that WikiHow's articles left in the data."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^\]\n]*\]", "", text).replace("  ", " ")


def hellaswag_metrics(questions: Sequence[ScoredQuestion]) -> dict[str, float]:
    """Compute accuracy by log-likelihood, and by log-likelihood per character of the ending."""
    correct, correct_norm = [], []
    for scored, label in questions:
        correct.append(argmax([score.log_likelihood for score, _ in scored]) == label)
        correct_norm.append(argmax([score.log_likelihood / max(chars, 1) for score, chars in scored]) == label)
    return mean_and_stderr("acc", correct) | mean_and_stderr("acc_norm", correct_norm)


def lambada_question(record: dict[str, Any]) -> Question:
    """Build a question from a LAMBADA record: the passage without its last word, and that word."""
    context, _, last = record["text"].rpartition(" ")
    return [(context, " " + last)], 0


def lambada_metrics(questions: Sequence[ScoredQuestion]) -> dict[str, float]:
    """Compute accuracy of greedy decoding on the last word, and the perplexity of that word."""
    scores = [scored[0][0] for scored, _ in questions]
    perplexity = bounded_exp(-statistics.fmean(score.log_likelihood for score in scores))
    return mean_and_stderr("acc", [score.is_greedy for score in scores]) | {"perplexity": perplexity}


def argmax(values: list[float]) -> int:
    """Return the index of the largest value, the first one on a tie."""
    return values.index(max(values))


def mean_and_stderr(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the mean and its standard error, as `name` and `name`_stderr."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {name: statistics.fmean(values), f"{name}_stderr": error}


def encode_pair(context: str, continuation: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Encode context and continuation together, then split the ids; spaces in between go to the continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    ids = tokenizer.encode(context + continuation).tolist()
    context_len = len(tokenizer.encode(context)) if context else 0
    if not context_len and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text], ids
    if not context_len:
        raise BadInput(
            f"nothing before {continuation[:40]!r}", "a context, as this vocabulary has no end-of-text token"
        )
    return ids[:context_len], ids[context_len:]


@torch.inference_mode()
def score_continuations(pairs: Sequence[tuple[str, str]], model: GPT2, tokenizer: Tokenizer) -> list[Score]:
    """Score each continuation given its context; the context is truncated on the left to the model's block size.

    Raises BadInput: a continuation alone is longer than the block size.
    """
    device, block_size = model.wte.weight.device, model.shape.block_size
    requests = [encode_pair(*pair, tokenizer) for pair in pairs]
    if (longest := max(len(continuation) for _, continuation in requests)) > block_size:
        raise BadInput(f"an ending of {longest:,} tokens", f"at most {block_size:,}, the model's block size")
    # Longest first, so that a batch needs little padding.
    order = sorted(range(len(pairs)), key=lambda i: -len(requests[i][0] + requests[i][1]))
    scores: dict[int, Score] = {}
    model.eval()
    with byte_progress("scoring", sum(len(context) + len(continuation) for context, continuation in pairs)) as advance:
        while len(scores) < len(order):
            begin = len(scores)
            longest = min(sum(map(len, requests[order[begin]])) - 1, block_size)
            chosen = order[begin : begin + max(1, BATCH_TOKENS // longest)]
            ids = torch.zeros(len(chosen), longest, dtype=torch.long)
            for row, index in enumerate(chosen):
                context, continuation = requests[index]
                inputs = (context + continuation)[-(block_size + 1) :][:-1]
                ids[row, : len(inputs)] = torch.tensor(inputs)
            hidden = model.hidden_states(ids.to(device))  # (B, T, C)
            for row, index in enumerate(chosen):
                context, continuation = requests[index]
                end = min(len(context) + len(continuation) - 1, block_size)
                last = hidden[row, max(0, end - len(continuation)) : end]
                scores[index] = score_tokens(model.logits(last).float(), continuation[-len(last) :])
            advance(sum(len(pairs[i][0]) + len(pairs[i][1]) for i in chosen))
    return [scores[i] for i in range(len(pairs))]


def score_tokens(logits: torch.Tensor, continuation: list[int]) -> Score:
    """Score n tokens by the logits (n, V) that predict them."""
    targets = torch.tensor(continuation, device=logits.device)
    log_probs = logits.log_softmax(-1).gather(1, targets[:, None])
    return Score(float(log_probs.sum()), bool((logits.argmax(-1) == targets).all()))
