"""HellaSwag and LAMBADA, compared with transformers and, where it is installed, with lm-evaluation-harness."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2box.evaluation.benchmarks import Score, lambada_metrics
from tests.helpers.commands import command
from tests.helpers.settings import TINYSHAKESPEARE

Measure = Callable[..., dict[str, Any]]

HELLASWAG = [
    {
        "activity_label": "Making tea",
        "ctx_a": f"A woman {verb} the kettle [step] with water.",
        "ctx_b": "she",
        "endings": [f"{word} it on the stove.", f"sings [title] loudly to {word}.", "leaves.", f"is  {word} a horse."],
        "label": str(number % 4),
    }
    for number, (verb, word) in enumerate(
        (verb, word) for verb in ("fills", "drops", "paints") for word in ("puts", "throws", "admires", "hath", "thy")
    )
]
LAMBADA = [{"text": f"{line.strip()} king"} for line in TINYSHAKESPEARE.read_text().splitlines()[:40] if len(line) > 25]
LAMBADA += [{"text": "word " * 60 + "and the end"}]  # longer than the context


def load_with_transformers(run: Path) -> tuple[Any, Any]:
    best = run / "checkpoints" / "best"
    return AutoModelForCausalLM.from_pretrained(best).eval(), AutoTokenizer.from_pretrained(best)


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def likelihood(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Return the log-likelihood of a continuation by transformers, and if greedy decoding gives it."""
    ids = (context + continuation)[-33:]
    logits = model(torch.tensor([ids[:-1]])).logits[0].detach().double().log_softmax(-1)[-len(continuation) :]
    return sum(float(row[i]) for row, i in zip(logits, continuation, strict=True)), bool(
        (logits.argmax(-1) == torch.tensor(continuation)).all()
    )


def test_benchmark_scores_match_transformers(run: Path, measure: Measure, tmp_path: Path) -> None:
    model, tokens = load_with_transformers(run)
    logs = []
    for record in LAMBADA:
        context, last = record["text"].rsplit(" ", 1)
        logs.append(likelihood(model, tokens(context)["input_ids"], tokens(" " + last)["input_ids"]))
    metrics = measure("--task", "lambada", "--file", write(tmp_path / "lambada.jsonl", LAMBADA))
    assert metrics["perplexity"] == pytest.approx(math.exp(-sum(log for log, _ in logs) / len(logs)), rel=1e-4)
    assert metrics["acc"] == pytest.approx(sum(greedy for _, greedy in logs) / len(logs))
    correct = [0, 0]
    for record in HELLASWAG:  # type: ignore[assignment]
        context = record["activity_label"] + ": " + record["ctx_a"].replace("[step] ", " ").replace("  ", " ") + " She"
        endings = [e.replace(" [title]", ". ").replace("  ", " ") for e in record["endings"]]
        scores = [likelihood(model, tokens(context)["input_ids"], tokens(" " + e)["input_ids"])[0] for e in endings]
        by_length = [score / len(ending) for score, ending in zip(scores, endings, strict=True)]
        for kind, values in enumerate((scores, by_length)):
            correct[kind] += values.index(max(values)) == int(record["label"])
    metrics = measure("--task", "hellaswag", "--file", write(tmp_path / "hellaswag.jsonl", HELLASWAG))
    assert [metrics["acc"], metrics["acc_norm"]] == [count / len(HELLASWAG) for count in correct]


@pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="lm-evaluation-harness (gpt2box[eval]) is not installed"
)
def test_metrics_match_lm_evaluation_harness(run: Path, measure: Measure, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = Path(lm_eval.__file__).parent / "tasks"
    text = TINYSHAKESPEARE.read_text()[-3000:]
    (tmp_path / "text.txt").write_text(text)
    files = {
        "hellaswag": write(tmp_path / "hellaswag.jsonl", HELLASWAG),
        "lambada": write(tmp_path / "lambada.jsonl", LAMBADA),
        "rolling": write(tmp_path / "rolling.jsonl", [{"text": text}]),
    }
    (tmp_path / "utils.py").write_text((tasks / "hellaswag" / "utils.py").read_text())
    common = "task: own_{0}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {1}\ntest_split: test\n"
    bodies = {
        "hellaswag": "output_type: multiple_choice\nprocess_docs: !function utils.process_docs\n"
        "doc_to_text: '{{query}}'\ndoc_to_target: '{{label}}'\n"
        "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        "lambada": "output_type: loglikelihood\ndoc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\n"
        "doc_to_target: \"{{' '+text.split(' ')[-1]}}\"\nmetric_list:\n  - metric: perplexity\n  - metric: acc\n",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n  - metric: byte_perplexity\n  - metric: word_perplexity\n",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.yaml").write_text(common.format(name, files[name]) + body)
    best = str(run / "checkpoints" / "best")
    harness = lm_eval.simple_evaluate(
        HFLM(best, device="cpu", batch_size=4, dtype="float32"),
        tasks=[f"own_{name}" for name in bodies],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    own = {
        "hellaswag": measure("--task", "hellaswag", "--file", files["hellaswag"]),
        "lambada": measure("--task", "lambada", "--file", files["lambada"]),
        "rolling": measure("--text", str(tmp_path / "text.txt")),
    }
    for name, key in [
        ("hellaswag", "acc"),
        ("hellaswag", "acc_norm"),
        ("lambada", "acc"),
        ("lambada", "perplexity"),
        ("rolling", "bits_per_byte"),
        ("rolling", "byte_perplexity"),
        ("rolling", "word_perplexity"),
    ]:
        expected = harness[f"own_{name}"][f"{key},none"]
        assert own[name][key] == pytest.approx(expected, rel=2e-6), (name, key)


def test_lambada_perplexity_of_a_very_unlikely_word_is_finite() -> None:
    assert 1e300 < lambada_metrics([([(Score(-2000.0, False), 3)], 0)])["perplexity"] < math.inf


def test_compressed_benchmark_files_give_the_same_perplexity(run: Path, measure: Measure, tmp_path: Path) -> None:
    import pyarrow

    lines = json.dumps({"text": "to be or not to be, that is the " + "\N{GRINNING FACE}" * 9}) + "\n"
    (tmp_path / "plain.jsonl").write_text(lines)
    with gzip.open(tmp_path / "compressed.jsonl.gz", "wt") as file:
        file.write(lines)
    with pyarrow.output_stream(tmp_path / "compressed.jsonl.zst", compression="zstd") as file:
        file.write(lines.encode())
    names = ("plain.jsonl", "compressed.jsonl.gz", "compressed.jsonl.zst")
    results = [measure("--task", "lambada", "--file", str(tmp_path / name)) for name in names]
    assert all(each["perplexity"] == results[0]["perplexity"] for each in results)


def test_damaged_benchmark_files_fail_with_an_error_message(run: Path, tmp_path: Path) -> None:
    question: dict[str, Any] = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"}
    changes: list[dict[str, Any]] = [
        {"endings": []},
        {"label": 9},
        {"label": -1},
        {"label": 1.9},
        {"endings": "abcd"},
        {"endings": {"d": 1}},
    ]
    cases = [(f"{json.dumps({**question, **change})}\n".encode(), "a.jsonl", 2) for change in changes]
    cases += [
        (b"[" * 100_000, "a.jsonl", 2),
        (b'{"label": Infinity}', "a.jsonl", 2),
        (b"junk", "a.jsonl.gz", 4),
        (b"junk", "a.jsonl.zst", 4),
        (b"PAR1junkPAR1", "a.parquet", 4),
    ]
    for content, name, expected in cases:
        (tmp_path / name).write_bytes(content)
        best = str(run / "checkpoints" / "best")
        code, output = command("eval", best, "--task", "hellaswag", "--file", str(tmp_path / name), "--device", "cpu")
        assert code == expected and "Traceback" not in output, (content[:60], output)
