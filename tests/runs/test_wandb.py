"""Weights & Biases: what an offline run holds, and what is said where it cannot be had."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import Command
from tests.helpers.settings import options

found = importlib.util.find_spec("wandb")
installed = found is not None and found.origin is not None
BLOCK = 32_768
KEY = "0123456789abcdef" * 2 + "01234567"


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, which is laid out as LevelDB's log: blocks of records, long ones in parts."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[import-not-found, unused-ignore]

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, part = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # all of it, or its end
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def figures(folder: Path) -> list[dict[str, float]]:
    """What was logged, step by step, of all sessions."""
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows.append(
                    {key: json.loads(value) for key, value in items.items() if key[:6] in ("train/", "eval/v", "_step")}
                )
    return rows


@pytest.mark.skipif(not installed, reason="wandb is not installed (it is optional: gpt2box[wandb])")
def test_an_offline_run_has_the_figures_of_metrics_jsonl_and_goes_on_under_its_id(
    volumes: Path, gpt2box: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path))
    for steps in (10, 20):
        done = gpt2box("train", *options(name="a", max_steps=steps), "--wandb=offline")
        assert done.returncode == 0, done.stderr
    run = volumes / "runs/a"
    expected: dict[int, dict[str, float]] = {}
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        numbers = {
            key: value for key, value in row.items() if type(value) in (int, float) and key not in ("step", "time")
        }
        expected.setdefault(row["step"], {"_step": row["step"]}).update(
            {f"{row['kind']}/{key}": value for key, value in numbers.items()}
        )
    assert figures(run) == list(expected.values()) and len(expected) == 5
    name = json.loads((run / "wandb.json").read_text())["id"]
    assert {path.stem for path in run.glob("wandb/offline-run-*/*.wandb")} == {f"run-{name}"}
    written = [path for path in [*run.rglob("*"), *tmp_path.glob(".*")] if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()], "the key is nowhere"


@pytest.mark.skipif(installed, reason="wandb is installed")
def test_without_wandb_a_run_that_asks_for_it_begins_nothing(volumes: Path, gpt2box: Command, tmp_path: Path) -> None:
    (tmp_path / "work/wandb").mkdir()  # as W&B leaves it where it ran: no package
    refused = gpt2box("train", *options(name="a"), "--wandb=online")
    assert refused.returncode == 3 and "next: pip install wandb" in refused.stderr, refused.stderr
    assert not (volumes / "runs/a").exists()


def test_online_wants_a_key_and_a_key_alone_sends_nothing(
    volumes: Path, started: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "packages/wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *sys.path]))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    refused = started("train", *options(name="a"), "--wandb=online")
    assert refused.returncode == 2 and "wandb login" in refused.stderr and "--wandb offline" in refused.stderr
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert "it was imported" in started("train", *options(name="b"), "--wandb=online").stderr
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    config = tmp_path / "c.yaml"
    config.write_text("wandb: off\n")
    assert started("train", str(config), *options(max_steps=2)).returncode == 0
