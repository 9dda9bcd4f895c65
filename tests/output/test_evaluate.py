"""`gpt2box eval`: held against transformers, and against lm-evaluation-harness where it is installed."""

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

from gpt2box.cli.model_commands import evaluate
from gpt2box.evaluation.benchmarks import Answer, lambada_figures
from gpt2box.evaluation.perplexity import windows
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.commands import Command, command
from tests.helpers.settings import TINY, TINYSHAKESPEARE

Evaluate = Callable[..., dict[str, Any]]

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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """A short run's folder, in GPT-2's tokens."""
    import shutil

    volumes = tmp_path_factory.mktemp("evaluated") / "volumes"
    shutil.copytree(prepared, volumes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2BOX_VOLUMES", str(volumes))
        settings = {**TINY, "name": "run", "dataset": "bpe", "learning_rate": 1e-2}
        run_job(None, {key: str(value) for key, value in settings.items()}, StopRequest())
        settings = {**TINY, "name": "whole", "eval_windows": 0, "max_steps": 2, "eval_interval": 2}
        run_job(None, {key: str(value) for key, value in settings.items()}, StopRequest())
    return volumes / "runs" / "run"


@pytest.fixture
def measure(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """The command's figures."""
    monkeypatch.setenv("GPT2BOX_VOLUMES", str(run.parents[1]))

    def figures(*arguments: str) -> dict[str, Any]:
        arguments = arguments if arguments[0] == "whole" else ("run", *arguments)
        capsys.readouterr()
        evaluate.main([*arguments, "--json"], standalone_mode=False)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return figures


def model_and_tokens(run: Path) -> tuple[Any, Any]:
    best = run / "checkpoints" / "best"
    return AutoModelForCausalLM.from_pretrained(best).eval(), AutoTokenizer.from_pretrained(best)


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("count, size, stride", [(100, 32, 32), (100, 32, 7), (5, 32, 32), (32, 32, 1), (33, 32, 32)])
def test_each_token_is_predicted_once_from_as_much_as_the_context_holds(count: int, size: int, stride: int) -> None:
    predicted = []
    for begin, end, first in windows(count, size, stride):
        predicted += list(range(first, end))
        assert end - begin == min(size, end) and begin <= first
    assert predicted == list(range(count))


@pytest.mark.parametrize("stride", [32, 10])
def test_loss_and_bits_per_byte_are_those_of_transformers_window_by_window(
    run: Path, measure: Evaluate, tmp_path: Path, stride: int
) -> None:
    text = TINYSHAKESPEARE.read_text()[-900:] + "naïve 漢字"
    (tmp_path / "text.txt").write_text(text)
    model, tokens = model_and_tokens(run)
    ids = torch.tensor([tokens.eos_token_id, *tokens(text)["input_ids"]])
    nats, done = 0.0, 0
    while done < len(ids) - 1:
        end = min(done + (stride if done else 32), len(ids) - 1)
        begin = max(0, end - 32)
        logits = model(ids[None, begin:end]).logits[0].detach().double().log_softmax(-1)
        nats -= sum(float(logits[i - begin, ids[i + 1]]) for i in range(done, end))
        done = end
    found = measure("--text", str(tmp_path / "text.txt"), "--stride", str(stride))
    assert found["tokens"] == len(ids) - 1 and found["bytes"] == len(text.encode())
    assert found["val_loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert found["byte_perplexity"] == pytest.approx(math.exp(nats / len(text.encode())), rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / len(text.split())), rel=1e-4)
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    again = measure("--text", str(tmp_path / "windows.txt"), "--stride", str(stride), "--max-tokens", "50")
    assert again["tokens"] == 50 and "word_perplexity" not in again
    assert (
        again["val_loss"]
        == measure("--text", str(tmp_path / "text.txt"), "--max-tokens", "50", "--stride", str(stride))["val_loss"]
    )


def test_a_whole_split_has_the_loss_that_training_noted(run: Path, measure: Evaluate) -> None:
    noted = [json.loads(line) for line in (run.parent / "whole" / "metrics.jsonl").open()]
    best = min(row["val_loss"] for row in noted if row["kind"] == "eval")
    found = measure("whole")  # training saw whole windows alone, all of them
    assert found["val_loss"] == pytest.approx(best, abs=2e-4)
    assert found["on"].endswith("data/text") and found["stride"] == 32


def likelihood(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = (context + continuation)[-33:]
    logits = model(torch.tensor([ids[:-1]])).logits[0].detach().double().log_softmax(-1)[-len(continuation) :]
    return sum(float(row[i]) for row, i in zip(logits, continuation, strict=True)), bool(
        (logits.argmax(-1) == torch.tensor(continuation)).all()
    )


def test_benchmarks_are_scored_as_transformers_says(run: Path, measure: Evaluate, tmp_path: Path) -> None:
    model, tokens = model_and_tokens(run)
    logs = []
    for record in LAMBADA:
        context, last = record["text"].rsplit(" ", 1)
        logs.append(likelihood(model, tokens(context)["input_ids"], tokens(" " + last)["input_ids"]))
    found = measure("--task", "lambada", "--file", write(tmp_path / "lambada.jsonl", LAMBADA))
    assert found["perplexity"] == pytest.approx(math.exp(-sum(log for log, _ in logs) / len(logs)), rel=1e-4)
    assert found["acc"] == pytest.approx(sum(greedy for _, greedy in logs) / len(logs))
    right = [0, 0]
    for record in HELLASWAG:  # type: ignore[assignment]
        context = record["activity_label"] + ": " + record["ctx_a"].replace("[step] ", " ").replace("  ", " ") + " She"
        endings = [e.replace(" [title]", ". ").replace("  ", " ") for e in record["endings"]]
        scores = [likelihood(model, tokens(context)["input_ids"], tokens(" " + e)["input_ids"])[0] for e in endings]
        by_length = [score / len(ending) for score, ending in zip(scores, endings, strict=True)]
        for kind, values in enumerate((scores, by_length)):
            right[kind] += values.index(max(values)) == int(record["label"])
    found = measure("--task", "hellaswag", "--file", write(tmp_path / "hellaswag.jsonl", HELLASWAG))
    assert [found["acc"], found["acc_norm"]] == [count / len(HELLASWAG) for count in right]


@pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="lm-evaluation-harness (gpt2box[eval]) is not installed"
)
def test_figures_are_those_of_lm_evaluation_harness(run: Path, measure: Evaluate, tmp_path: Path) -> None:
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
    common = "task: ours_{0}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {1}\ntest_split: test\n"
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
    theirs = lm_eval.simple_evaluate(
        HFLM(best, device="cpu", batch_size=4, dtype="float32"),
        tasks=[f"ours_{name}" for name in bodies],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    ours = {
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
        expected = theirs[f"ours_{name}"][f"{key},none"]
        assert ours[name][key] == pytest.approx(expected, rel=2e-6), (name, key)


def test_a_benchmarks_file_may_be_packed_and_no_word_is_too_unlikely(
    run: Path, measure: Evaluate, tmp_path: Path
) -> None:
    import pyarrow

    assert lambada_figures([([(Answer(-2000.0, False), 3)], 0)])["perplexity"] > 1e300
    lines = json.dumps({"text": "to be or not to be, that is the " + "\N{GRINNING FACE}" * 9}) + "\n"
    (tmp_path / "plain.jsonl").write_text(lines)
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.write(lines)
    with pyarrow.output_stream(tmp_path / "packed.jsonl.zst", compression="zstd") as packed:
        packed.write(lines.encode())
    names = ("plain.jsonl", "packed.jsonl.gz", "packed.jsonl.zst")
    found = [measure("--task", "lambada", "--file", str(tmp_path / name)) for name in names]
    assert all(each["perplexity"] == found[0]["perplexity"] for each in found)


def test_a_damaged_benchmark_is_said(run: Path, tmp_path: Path) -> None:
    question: dict[str, Any] = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"}
    wrong: list[dict[str, Any]] = [
        {"endings": []},
        {"label": 9},
        {"label": -1},
        {"label": 1.9},
        {"endings": "abcd"},
        {"endings": {"d": 1}},
    ]
    cases = [(f"{json.dumps({**question, **change})}\n".encode(), "a.jsonl", 2) for change in wrong]
    cases += [
        (b"[" * 100_000, "a.jsonl", 2),
        (b'{"label": Infinity}', "a.jsonl", 2),
        (b"junk", "a.jsonl.gz", 4),
        (b"junk", "a.jsonl.zst", 4),
        (b"PAR1junkPAR1", "a.parquet", 4),
    ]
    for content, name, code in cases:
        (tmp_path / name).write_bytes(content)
        best = str(run / "checkpoints" / "best")
        ended, said = command("eval", best, "--task", "hellaswag", "--file", str(tmp_path / name), "--device", "cpu")
        assert ended == code and "Traceback" not in said, (content[:60], said)


def test_bad_requests_are_a_few_lines(
    run: Path, gpt2box: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2BOX_VOLUMES", str(run.parents[1]))
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    for arguments, part in [
        (["run", "--dataset", "text"], "text is in tokens of a char tokenizer of 65"),
        (["run", "--dataset", "none"], "no dataset in"),
        (["--task", "hellaswag", "--text", str(tmp_path / "latin.txt")], "--text with --task"),
        (["--file", str(tmp_path / "bad.jsonl")], "--file without --task"),
        (["run", "--task", "lambada", "--file", str(tmp_path / "bad.jsonl")], "bad.jsonl is not lambada"),
        (["run", "--task", "lambada", "--file", str(tmp_path / "broken.jsonl")], "broken.jsonl, line 1"),
        (["run", "--text", str(tmp_path / "latin.txt")], "latin.txt"),
        (["nothing"], "a run ("),
    ]:
        done = gpt2box("eval", *arguments)
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr
