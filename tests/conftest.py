"""Small real things to test with: datasets, models, the command itself. No mocks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from gpt2box.checkpoint import writer as checkpoint
from gpt2box.checkpoint.metadata import TrainState
from gpt2box.data import downloads
from gpt2box.data.prepare_texts import Request, prepare_few
from gpt2box.data.sources import own_text, tinyshakespeare
from gpt2box.data.tokenizer import Gpt2Tokenizer, Tokenizer, from_ranks
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.shape import ModelShape

ROOT = Path(__file__).parents[1]
# How long an example takes says more of the machine than of the code.
settings.register_profile("gpt2box", deadline=None)
settings.load_profile("gpt2box")
TINYSHAKESPEARE = Path(__file__).parent / "data_files" / "tinyshakespeare.txt"


@pytest.fixture(autouse=True)
def smallest_numbers_are_not_zero() -> None:
    """What PyTorch 2.4 compiles for a CPU (-ffast-math) has its process take them for zero, also in later tests."""
    torch.set_flush_denormal(False)


# Seconds-long runs; settings that a test changes are given as further options.
TINY = {
    "dataset": "text",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "micro_batch_size": 4,
    "tokens_per_step": 256,
    "max_steps": 20,
    "learning_rate": 1e-3,
    "eval_interval": 10,
    "eval_windows": 8,
    "log_interval": 5,
    "device": "cpu",
    "keep_last": 100,
}


@pytest.fixture(scope="session")
def ranks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's ranks: a copy in the checkout's volumes, else fetched once (which tests that path)."""
    folder = ROOT / "volumes" / "data" / "raw"
    if not (folder / downloads.GPT2_RANKS.filename).exists():
        folder = tmp_path_factory.mktemp("raw")
    return downloads.fetch(downloads.GPT2_RANKS, folder)


@pytest.fixture(scope="session")
def gpt2_tokenizer(ranks_file: Path) -> Gpt2Tokenizer:
    return from_ranks(ranks_file)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, ranks_file: Path) -> Path:
    """Volumes with tinyshakespeare in characters, as dataset `text`, and the raw files."""
    volumes = tmp_path_factory.mktemp("prepared")
    raw = volumes / "data" / "raw"
    raw.mkdir(parents=True)
    shutil.copy(TINYSHAKESPEARE, raw)
    shutil.copy(ranks_file, raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2BOX_VOLUMES", str(volumes))
        prepare_few(tinyshakespeare(), Request("char", 0.1), volumes / "data" / "text")
        prepare_few(own_text([str(TINYSHAKESPEARE)]), Request("gpt2", 0.1), volumes / "data" / "bpe")
    return volumes


@pytest.fixture
def volumes(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Volumes of the test's own, with those datasets."""
    folder = tmp_path / "volumes"
    shutil.copytree(prepared, folder)
    monkeypatch.setenv("GPT2BOX_VOLUMES", str(folder))
    return folder


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """What all commands of a test worker are forked from."""
    found = Forked(tmp_path_factory.mktemp("forked"))
    yield found
    found.end()


class Forked:
    """Runs commands in processes of their own that need not import PyTorch anew (server.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
            cwd=folder,
        )
        assert self.process.stdout is not None and json.loads(self.process.stdout.readline()) == "ready"

    def run(self, arguments: Sequence[str], folder: Path, text: str = "") -> subprocess.CompletedProcess[str]:
        """A command in that folder, with the environment that is this process's now; `text`: its standard input."""
        assert self.process.stdin is not None and self.process.stdout is not None
        paths = [self.folder / name for name in ("input", "output", "errors")]
        paths[0].write_text(text, encoding="utf-8")
        request = {
            "arguments": arguments,
            "environment": os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            "all_of_it": True,
            "folder": str(folder),
            "input": str(paths[0]),
            "outputs": [str(path) for path in paths[1:]],
            "kill_after": 300,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = json.loads(self.process.stdout.readline())["code"]
        output, errors = (path.read_text(encoding="utf-8", errors="replace") for path in paths[1:])
        return subprocess.CompletedProcess(["gpt2box", *arguments], code, output, errors)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture
def gpt2box(tmp_path: Path, forked: Forked) -> Command:
    """The command in a process of its own, in an empty folder."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)

    def run(*arguments: str, input: str = "") -> subprocess.CompletedProcess[str]:
        return forked.run(arguments, work, input)

    return run


@pytest.fixture
def started(tmp_path: Path) -> Command:
    """The same, started from nothing: for what is read while a process begins."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)

    def run(*arguments: str, preexec_fn: Callable[[], object] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gpt2box", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=work, env=environment, timeout=300, preexec_fn=preexec_fn
        )

    return run


def options(**changes: object) -> list[str]:
    """A tiny run's settings as command-line options."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in {**TINY, **changes}.items()]


def tiny_model(
    bias: bool = True, vocab_size: int = 101, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> GPT2:
    """A random model with a vocabulary that needs padding, and nothing left at zero."""
    model = GPT2(ModelShape(n_layer=3, n_head=4, n_embd=32, block_size=24, vocab_size=vocab_size, bias=bias), dropout)
    model.initialise(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
            else:
                parameter.mul_(5)
    return model.to(dtype)


def write_checkpoint(folder: Path, model: GPT2, words: Tokenizer) -> None:
    """A checkpoint of step 0 in a folder of any name."""
    state = TrainState()
    files = checkpoint.contents(model, torch.optim.AdamW(model.parameters()), state)
    checkpoint.write_into(folder, files, checkpoint.config_of(model, words), state, words)
