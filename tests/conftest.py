"""Small real things to test with: datasets, models, the command itself. No mocks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from gpt2box.data import downloads
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.prepare_texts import prepare_texts
from gpt2box.data.sources import load_texts, load_tinyshakespeare
from gpt2box.data.tokenizer import Gpt2Tokenizer, load_gpt2_tokenizer
from tests.helpers.commands import Command, Forked
from tests.helpers.settings import ROOT, TINYSHAKESPEARE

# No deadline: an example's duration depends on how busy the machine is.
settings.register_profile("gpt2box", deadline=None)
settings.load_profile("gpt2box")


@pytest.fixture(autouse=True)
def smallest_numbers_are_not_zero() -> None:
    """Switch off flush-to-zero, which PyTorch 2.4's compiled CPU code (-ffast-math) leaves on for the process."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def ranks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return GPT-2's merge ranks: the checkout's copy, or else downloaded once, which tests the download."""
    folder = ROOT / "volumes" / "data" / "raw"
    if not (folder / downloads.GPT2_RANKS.filename).exists():
        folder = tmp_path_factory.mktemp("raw")
    return downloads.fetch(downloads.GPT2_RANKS, folder)


@pytest.fixture(scope="session")
def gpt2_tokenizer(ranks_file: Path) -> Gpt2Tokenizer:
    return load_gpt2_tokenizer(ranks_file)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, ranks_file: Path) -> Path:
    """Prepare tinyshakespeare as the datasets `text` (characters) and `bpe`, beside the raw files."""
    volumes = tmp_path_factory.mktemp("prepared")
    raw = volumes / "data" / "raw"
    raw.mkdir(parents=True)
    shutil.copy(TINYSHAKESPEARE, raw)
    shutil.copy(ranks_file, raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2BOX_VOLUMES", str(volumes))
        prepare_texts(load_tinyshakespeare(), PrepareConfig("char", 0.1), volumes / "data" / "text")
        prepare_texts(load_texts([str(TINYSHAKESPEARE)]), PrepareConfig("gpt2", 0.1), volumes / "data" / "bpe")
    return volumes


@pytest.fixture
def volumes(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the prepared volumes for one test."""
    folder = tmp_path / "volumes"
    shutil.copytree(prepared, folder)
    monkeypatch.setenv("GPT2BOX_VOLUMES", str(folder))
    return folder


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """Start the server that runs commands in forked processes, one for each test worker."""
    found = Forked(tmp_path_factory.mktemp("forked"))
    yield found
    found.end()


@pytest.fixture
def gpt2box(tmp_path: Path, forked: Forked) -> Command:
    """Return a function that runs a command in a forked process, in an empty folder."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)

    def run(*arguments: str, input: str = "") -> subprocess.CompletedProcess[str]:
        return forked.run(arguments, work, input)

    return run


@pytest.fixture
def started(tmp_path: Path) -> Command:
    """Return a function that runs a command in a new interpreter, to test what happens at start-up."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)

    def run(*arguments: str, preexec_fn: Callable[[], object] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gpt2box", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=work, env=environment, timeout=300, preexec_fn=preexec_fn
        )

    return run
