"""Every file that is read, broken in hundreds of ways: it is read, or refused in words; never a traceback."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gpt2box.checkpoint.metadata import load_verified_state
from gpt2box.config import loader
from gpt2box.data import readers, tokenizer
from gpt2box.data.dataset import open_dataset
from gpt2box.data.dataset_folder import find_damaged_splits, read_manifest
from gpt2box.data.pretrained import load_shape
from gpt2box.errors import Gpt2boxError
from gpt2box.evaluation import benchmarks
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import load_hf_weights
from gpt2box.report.page import write_report
from gpt2box.runs import metrics
from gpt2box.runs.view import RunView
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.settings import TINY

TIMES = int(os.environ.get("GPT2BOX_BROKEN_FILES", "60"))  # mutations of each file
ODD: list[object] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "../../etc", "a/b", "\0", "\x1b[2J", "ü" * 300, [], [[]], [None], {}, {"a": {}}, [1, "2", None], "NaN", "1e9",
    "\ud800",
]  # fmt: skip


def other_json(content: bytes, chance: random.Random) -> bytes:
    """One value, somewhere, is another, or gone."""
    whole = json.loads(content)
    places: list[tuple[object, object]] = []

    def walk(value: object) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            if len(places) < 2000:
                walk(inner)

    walk(whole)
    if not places or chance.random() < 0.05:
        return json.dumps(chance.choice(ODD)).encode()
    holder, key = chance.choice(places)
    if chance.random() < 0.2:
        del holder[key]  # type: ignore[attr-defined]
    else:
        holder[key] = chance.choice(ODD)  # type: ignore[index]
    return json.dumps(whole).encode()


def other_bytes(content: bytes, chance: random.Random) -> bytes:
    """Cut off, with bytes changed, put in or left out."""
    kind = chance.randrange(5)
    if kind == 0:
        return content[: chance.randrange(len(content) + 1)]
    if kind == 1:
        return bytes(chance.randrange(256) for _ in range(chance.randrange(200)))
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 3, 20])):
        at = chance.randrange(len(changed) or 1)
        if kind == 2 and changed:
            changed[min(at, len(changed) - 1)] = chance.randrange(256)
        elif kind == 3:
            changed[at:at] = bytes([chance.randrange(256)]) * chance.choice([1, 4, 100])
        else:
            del changed[at : at + chance.choice([1, 2, 50])]
    return bytes(changed)


def broken(path: Path, read: Callable[[], object], seed: int = 0) -> None:
    """Read the file in many broken states."""
    content = path.read_bytes()
    structured = path.suffix == ".json"
    read()  # as it is, it is read
    for number in range(TIMES):
        chance = random.Random(f"{path.name} {seed} {number}")
        mutant = (other_json if structured and chance.random() < 0.7 else other_bytes)(content, chance)
        path.write_bytes(mutant)
        try:
            with contextlib.suppress(Gpt2boxError):
                read()
        except BaseException as error:
            error.add_note(f"{path.name}, mutation {number}: {mutant[:300]!r}") if hasattr(error, "add_note") else None
            raise
    path.write_bytes(content)


RECORDS = [{"text": f'document {i} with ünicode and "quotes"', "n": i} for i in range(20)]


def record_file(folder: Path, name: str) -> Path:
    path = folder / name
    lines = "\n".join(json.dumps(record) for record in RECORDS).encode()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
        return path
    if name.startswith("array"):
        lines = json.dumps(RECORDS).encode()
    if ".csv" in name:
        lines = b"text,n\n" + "\n".join(f'"{i} ""a"" b\nc",{i}' for i in range(20)).encode()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(lines))
    return path


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "array.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.txt.bz2", "a.csv.xz"]
)
def test_texts_and_records(tmp_path: Path, name: str) -> None:
    path = record_file(tmp_path, name)

    def read() -> int:
        readers.read_column_names(path)
        column = "text" if "txt" not in name else ""
        return sum(
            len(text)
            for unit in readers.split_into_units(path, name, column)
            for part in readers.read_documents(unit)
            for text in part
        )

    broken(path, read)


@pytest.mark.parametrize("name", ["dataset.json", "tokenizer/tokenizer.json", "train.bin"])
@pytest.mark.parametrize("dataset", ["text", "bpe"])
def test_a_dataset(volumes: Path, dataset: str, name: str) -> None:
    folder = volumes / "data" / dataset
    if not (folder / name).exists():
        name = "tokenizer/vocab.json"

    def read() -> None:
        found = open_dataset(folder)
        find_damaged_splits(folder, read_manifest(folder))
        assert found.tokens("train") >= 0

    broken(folder / name, read)


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes with a run of a few steps."""
    volumes = tmp_path_factory.mktemp("trained") / "volumes"
    shutil.copytree(prepared, volumes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2BOX_VOLUMES", str(volumes))
        values = {key: str(value) for key, value in {**TINY, "name": "run", "max_steps": 10}.items()}
        run_job(None, values, StopRequest())
    return volumes


@pytest.mark.parametrize(
    "name", ["state.json", "config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"]
)
def test_a_checkpoint(trained: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "step-00000010"
    shutil.copytree((trained / "runs/run/checkpoints/last").resolve(), folder)

    def read() -> None:
        with contextlib.suppress(Gpt2boxError):
            load_verified_state(folder)
        shape = load_shape(folder)
        if shape.parameters < 10**7:
            load_hf_weights(GPT2(shape), folder)
        tokenizer.load_tokenizer(folder)

    broken(folder / name, read)


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "plan.json", "manifest.json", "config.yaml", "checkpoints/last/state.json"],
)
def test_a_run_is_looked_at(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("GPT2BOX_VOLUMES", str(tmp_path))
    folder = tmp_path / "runs" / "run"
    shutil.copytree(trained / "runs/run", folder, symlinks=True)

    def read() -> None:
        list(metrics.iter_rows(folder / "metrics.jsonl"))
        run = RunView(folder).summary
        json.dumps(run.as_dict())
        write_report(folder)

    broken(folder / name, read)


@pytest.mark.parametrize("config", ["demo", "finetune"])
def test_configs(tmp_path: Path, config: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes((loader.PRESETS_DIR / f"{config}.yaml").read_bytes())
    broken(path, lambda: loader.load_config(str(path), {}))
    path = tmp_path / "train_mine.py"
    path.write_text("batch_size = 12\nblock_size = 64 * 2\nlearning_rate = 1e-3\n# a\ndataset = 'x'\ncompile = False\n")
    broken(path, lambda: loader.load_config(str(path), {}))


@pytest.mark.parametrize("task", ["hellaswag", "lambada"])
def test_task_files(tmp_path: Path, task: str) -> None:
    path = tmp_path / "task.jsonl"
    record = (
        {"ctx_a": "A man", "ctx_b": "he", "activity_label": "x", "endings": ["a", "b", "c", "d"], "label": "1"}
        if task == "hellaswag"
        else {"text": "the last word"}
    )
    path.write_text("\n".join([json.dumps(record)] * 4))
    broken(path, lambda: benchmarks.read_questions(task, path, None))
