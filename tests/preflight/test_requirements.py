"""What a job needs from outside: a text given in a dataset's place, the space for all of it, configs of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2box.config import loader
from gpt2box.data.dataset import open_dataset
from gpt2box.utils.paths import dataset_name
from tests.helpers.commands import Command
from tests.helpers.settings import TINY

BOOK = "It was a bright cold day in April, and the clocks were striking thirteen. " * 200
SMALL = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items() if key != "dataset"]


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Moby Dick (1851).txt", "Moby-Dick-1851"),
        ("Über uns.md", "Uber-uns"),
        ("chapter.one.txt", "chapter.one"),
        ("Война и мир.txt", "text-5d1bede8"),
        ("shelf/letters.txt", "letters"),
        ("shakespeare", "shakespeare"),
        ("/data/owt", "/data/owt"),
    ],
)
def test_a_text_stands_for_the_dataset_named_after_it(title: str, name: str) -> None:
    assert dataset_name(title) == name


def test_names_of_files_that_are_there_count_whatever_their_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for title in ("notes.text", "diary"):
        (tmp_path / title).write_text(BOOK)
    (tmp_path / "letters").mkdir()
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "nanogpt" / "train.bin").touch()
    names = [dataset_name(given) for given in ("notes.text", "diary", "./letters", "./nanogpt")]
    assert names == ["notes", "diary", "letters", "./nanogpt"]


def test_another_dataset_than_the_configs_gives_another_run() -> None:
    assert loader.load_config("finetune", {"dataset": "mybook.txt"})[0].name == "finetune-mybook"
    assert loader.load_config("finetune", {"dataset": "shakespeare"})[0].name == "finetune"
    assert loader.load_config("finetune", {"dataset": ""})[0].dataset == "shakespeare"  # an unset variable of a script
    assert loader.load_config("finetune", {"dataset": "mybook", "name": "own"})[0].name == "own"


def test_configs_of_ones_own_folder_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo.yaml").write_text("dataset: x\nmax_steps: 7\n")
    (tmp_path / "night.yaml").write_text("dataset: x\n")
    monkeypatch.setenv("GPT2BOX_CONFIGS", str(tmp_path))
    assert loader.load_config("demo", {})[0].max_steps == 7
    assert loader.load_config("night", {})[0].name == "night" and "finetune" in loader.list_presets()


def test_train_alone_makes_the_dataset_from_a_text(tmp_path: Path, volumes: Path, gpt2box: Command) -> None:
    (tmp_path / "my book.txt").write_text(BOOK)
    config = tmp_path / "small.yaml"
    config.write_text("dataset: shakespeare\n")
    train = ["train", str(config), "--dataset", str(tmp_path / "my book.txt"), *SMALL, "--max-steps", "2"]
    done = gpt2box(*train)
    assert done.returncode == 0 and "dataset my-book: made" in done.stderr, done.stderr
    assert (volumes / "runs" / "small-my-book" / "checkpoints" / "last").exists()
    assert "finished" in gpt2box(*train).stderr
    (tmp_path / "my book.txt").write_text(BOOK + "THE END")
    changed = gpt2box(*train)
    assert changed.returncode == 2 and "not the one that the run small-my-book began with" in changed.stderr


def test_fetch_makes_a_known_corpus_and_does_nothing_twice(volumes: Path, gpt2box: Command) -> None:
    first, second = gpt2box("fetch", "demo"), gpt2box("fetch", "demo")
    assert first.returncode == second.returncode == 0
    assert "shakespeare-char: made" in first.stderr and "shakespeare-char: there" in second.stderr
    assert open_dataset(volumes / "data" / "shakespeare-char").tokenizer.kind == "char"


def test_fetch_says_before_it_begins_that_the_disk_is_too_small(volumes: Path, gpt2box: Command) -> None:
    done = gpt2box("fetch", "demo", "--n-layer", "1000", "--n-embd", "100000")  # 120 trillion parameters
    assert done.returncode == 78 and "the job writes" in done.stderr and "more" in done.stderr
    assert not (volumes / "data" / "shakespeare-char").exists()


def test_fetch_of_a_dataset_that_nothing_can_make_says_how(volumes: Path, gpt2box: Command) -> None:
    done = gpt2box("fetch", "finetune", "--dataset", "opnwebtext", "--device", "cpu")
    assert done.returncode == 2 and "put nanoGPT's train.bin and val.bin there" in done.stderr
