"""Many documents: the right bytes in the right order, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2box.data import text_chunks, tokenize_workers
from gpt2box.data.bin_writer import DIGEST_BYTES, DuplicateFilter
from gpt2box.data.bulk_tokenizer import BulkEncoder
from gpt2box.data.corpus import open_own_files
from gpt2box.data.dataset import open_dataset
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.prepare_corpus import prepare_corpus
from gpt2box.data.readers import Unit
from gpt2box.data.sources import find_files
from gpt2box.data.tokenizer import Gpt2Tokenizer
from gpt2box.errors import BadInput
from tests.helpers.commands import Command
from tests.helpers.corpora import FILES, speeches
from tests.helpers.settings import TINYSHAKESPEARE


def in_order(texts: Sequence[str]) -> list[str]:
    """The texts as the corpus's files have them."""
    return [text for index in range(FILES) for text in texts[index::FILES]]


def joined(words: Gpt2Tokenizer, texts: Sequence[str]) -> bytes:
    """What a .bin file with these documents holds."""
    parts = [np.append(words.encode(text), np.uint16(50_256)) for text in texts]
    return np.concatenate(parts).astype("<u2").tobytes()


def bins(folder: Path) -> list[bytes]:
    return [(folder / f"{split}.bin").read_bytes() for split in ("train", "val")]


def test_the_order_and_split_are_nanogpts(
    volumes: Path, corpus: Path, gpt2box: Command, gpt2_tokenizer: Gpt2Tokenizer
) -> None:
    """datasets' train_test_split(test_size, seed, shuffle=True): one permutation, whose beginning is held out."""
    done = gpt2box("prepare", "openwebtext", "--from", str(corpus), "--split", "nanogpt")
    assert done.returncode == 0, done.stderr
    texts = in_order(speeches())
    order = np.random.default_rng(2357).permutation(len(texts))
    held_out = int(np.ceil(0.0005 * len(texts)))
    expected = [[texts[i] for i in order[held_out:]], [texts[i] for i in order[:held_out]]]
    assert bins(volumes / "data/openwebtext") == [joined(gpt2_tokenizer, part) for part in expected]
    dataset = open_dataset(volumes / "data/openwebtext")
    assert [dataset.manifest["splits"][s]["documents"] for s in ("train", "val")] == [len(texts) - held_out, held_out]


def test_documents_keep_their_order_and_come_once_whatever_the_number_of_workers(
    volumes: Path, corpus: Path, gpt2box: Command, gpt2_tokenizer: Gpt2Tokenizer
) -> None:
    for workers in ("1", "3"):
        done = gpt2box(
            *["prepare", "openwebtext", "--from", str(corpus), "--val-fraction", "0.1"],
            *["--workers", workers, "--name", workers],
        )
        assert done.returncode == 0, done.stderr
    train, val = bins(volumes / "data/1")
    assert [train, val] == bins(volumes / "data/3")
    kept = list(dict.fromkeys(in_order(speeches())))
    decoded = [
        gpt2_tokenizer.decode_bytes(np.frombuffer(part, "<u2").tolist()).decode().split("<|endoftext|>")[:-1]
        for part in (train, val)
    ]
    held_out = set(decoded[1])
    assert decoded == [[t for t in kept if t not in held_out], [t for t in kept if t in held_out]]
    assert 0.07 < len(held_out) / len(kept) < 0.13
    dropped = open_dataset(volumes / "data/1").manifest["duplicates_left_out"]
    assert dropped == len(speeches()) - len(kept) > 0 and f"left out: {dropped} exact duplicates" in done.stderr


@pytest.mark.parametrize("split", ["content", "nanogpt"])
def test_killed_at_any_moment_it_ends_in_the_same_bytes(volumes: Path, corpus: Path, split: str) -> None:
    command = [sys.executable, "-m", "gpt2box", "prepare", "openwebtext", "--from", str(corpus), "--split", split]
    command += ["--workers", "1", "--val-fraction", "0.01"]
    begin = time.monotonic()
    subprocess.run([*command, "--name", "whole"], check=True, capture_output=True)
    took = time.monotonic() - begin
    chance = random.Random(split)
    for _ in range(6):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(took * chance.uniform(0.3, 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert bins(volumes / "data/openwebtext") == bins(volumes / "data/whole")
    assert not list((volumes / "data").glob(".openwebtext.*.tmp"))


def test_workers_end_with_a_killed_parent(volumes: Path, corpus: Path) -> None:
    command = [sys.executable, "-m", "gpt2box", "prepare", "openwebtext", "--from", str(corpus), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(pids := children.read_text().split()) < 3:  # with the resource tracker
        time.sleep(0.01)
    time.sleep(0.5)
    process.kill()
    process.wait()
    limit = time.monotonic() + 20
    while alive := [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and is_alive(pid)]:
        assert time.monotonic() < limit, alive
        time.sleep(0.1)


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_full_disk_loses_nothing(tmp_path: Path, volumes: Path, started: Command) -> None:
    for name in "abc":
        rows = [json.dumps({"text": f"{name} {text}"}) for text in speeches()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    command = ["prepare", *(str(tmp_path / f"{name}.jsonl") for name in "abc")]
    command += ["--workers", "1", "--max-docs", "1000000"]

    def small_files() -> None:  # the nearest that can be had without a disk of one's own
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))

    full = started(*command, preexec_fn=small_files)
    assert full.returncode == 78 and "cannot write" in full.stderr and "free space" in full.stderr, full.stderr
    assert "Traceback" not in full.stderr
    done = started(*command)
    assert done.returncode == 0 and "going on with a-first-1000000 where it was" in done.stderr, done.stderr
    assert started(*command, "--name", "whole").returncode == 0
    assert bins(volumes / "data/a-first-1000000") == bins(volumes / "data/whole")


def test_shards_of_a_partial_folder_are_selected_by_the_number_in_their_names(
    tmp_path: Path, volumes: Path, corpus: Path, gpt2box: Command
) -> None:
    for path in sorted(corpus.glob("*.parquet"))[2:6]:
        (tmp_path / path.name).symlink_to(path)
    missing = gpt2box("prepare", "openwebtext", "--from", str(tmp_path), "--shards", "1:6")
    assert missing.returncode == 2 and "no train-00001-of-00006.parquet" in missing.stderr
    for folder, name in ((tmp_path, "partial"), (corpus, "complete")):
        done = gpt2box("prepare", "openwebtext", "--from", str(folder), "--shards", "2:6", "--name", name)
        assert done.returncode == 0, done.stderr
    assert bins(volumes / "data/partial") == bins(volumes / "data/complete")


def test_a_signal_leaves_no_process_and_no_copy_of_the_input(volumes: Path, corpus: Path) -> None:
    command = [sys.executable, "-m", "gpt2box", "prepare", "-", "--workers", "1", "--max-docs", "1000000"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin and process.stderr
    while not list((volumes / "data/raw").glob(".stdin-*/stdin.txt")):
        time.sleep(0.01)
    process.stdin.write("some text\n" * 100)
    process.stdin.flush()
    time.sleep(0.5)  # it waits for more
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert process.stderr.read() == "stopped: the same command goes on where it was\n"
    assert not list((volumes / "data/raw").glob(".stdin-*"))


def test_a_part_of_the_corpus_has_a_name_of_its_own(volumes: Path, corpus: Path, gpt2box: Command) -> None:
    base = ["prepare", "openwebtext", "--from", str(corpus), "--val-fraction", "0.1"]
    assert gpt2box(*base, "--max-docs", "500", "--keep-duplicates").returncode == 0
    assert gpt2box(*base, "--shards", "1:3").returncode == 0
    counts = [
        sum(part["documents"] for part in open_dataset(volumes / "data" / name).manifest["splits"].values())
        for name in ("openwebtext-first-500", "openwebtext-1-3")
    ]
    assert counts[0] == 500
    assert counts[1] == len({text for index in (1, 2) for text in speeches()[index::FILES]})


def test_broken_files_are_named_and_mended_ones_taken(
    tmp_path: Path, volumes: Path, corpus: Path, gpt2box: Command
) -> None:
    good = corpus / "train-00000-of-00006.parquet"
    path = tmp_path / "a.parquet"
    content = bytearray(good.read_bytes())
    base = ["prepare", str(path), "--max-docs", "3000"]  # the way of large texts
    path.write_bytes(content[: len(content) // 2])
    torn = gpt2box(*base)
    assert torn.returncode == 4 and "a.parquet is no whole Parquet file" in torn.stderr, torn.stderr
    table = pyarrow.parquet.ParquetFile(good)
    start = table.metadata.row_group(7).column(1).data_page_offset
    content[start : start + 400] = os.urandom(400)
    path.write_bytes(content)
    broken = gpt2box(*base)
    assert broken.returncode == 4 and "row group" in broken.stderr and "Traceback" not in broken.stderr, broken.stderr
    path.write_bytes(good.read_bytes())
    wrong = gpt2box(*base, "--text-column", "body")
    assert wrong.returncode == 2 and "no column 'body'" in wrong.stderr and "one of: id, text" in wrong.stderr
    number = gpt2box(*base, "--text-column", "id")
    assert number.returncode == 2 and "the text is int" in number.stderr and "Traceback" not in number.stderr
    assert gpt2box(*base).returncode == 0


def test_a_dataset_is_read_again_and_compared(volumes: Path, gpt2box: Command) -> None:
    whole = gpt2box("prepare", "--verify", "bpe")
    assert whole.returncode == 0 and "hash to what dataset.json says" in whole.stderr
    path = volumes / "data/bpe/val.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    damaged = gpt2box("prepare", "--verify", "bpe")
    assert damaged.returncode == 4 and "val.bin does not hash" in damaged.stderr
    folder = volumes / "data/foreign"
    folder.mkdir()
    for split in ("train", "val"):
        np.array([1, 2, 60_000] * 500, "<u2").tofile(folder / f"{split}.bin")
    foreign = gpt2box("prepare", "--verify", "foreign")
    assert foreign.returncode == 4 and "token id 60,000" in foreign.stderr
    assert gpt2box("prepare", "--verify", "nothing").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["shakespeare", "--shards", "0:2"], "--shards has no meaning for shakespeare"),
        (["openwebtext", "--tokenizer", "char"], "--tokenizer has no meaning for openwebtext"),
        (["openwebtext", "--shards", "2:2"], "'2:2' is not two numbers"),
        (["openwebtext", "--max-docs", "0"], "max-docs"),
        (["hub:", "--hub-split", "test"], "no dataset after hub:"),
        (["nowhere/*.txt"], "no file matches nowhere/*.txt"),
        (["-", "openwebtext"], "together with other inputs"),
    ],
)
def test_options_that_cannot_be_are_refused(volumes: Path, gpt2box: Command, arguments: list[str], part: str) -> None:
    done = gpt2box("prepare", *arguments)
    assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_few_long_texts_are_cut_and_not_held_out(tmp_path: Path, volumes: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " + TINYSHAKESPEARE.read_text())
    folder = volumes / "data/long"
    manifest, _ = prepare_corpus(
        open_own_files(find_files([str(tmp_path / "*.txt")])), PrepareConfig(val_fraction=0.1, workers=1), folder
    )
    train, val = (manifest["splits"][split] for split in ("train", "val"))
    assert train["documents"] == val["documents"] == 2
    assert val["tokens"] == pytest.approx(0.1 * (train["tokens"] + val["tokens"]), abs=2)
    assert np.fromfile(folder / "val.bin", "<u2")[-1] == 50_256


def test_where_chance_holds_out_nothing_the_end_is(tmp_path: Path, volumes: Path) -> None:
    """Twelve documents at 1%: by their content none is drawn."""
    path = tmp_path / "few.jsonl"
    texts = [f"{index} and more. " * 2000 for index in range(12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    collection = open_own_files(find_files([str(path)]))
    manifest, _ = prepare_corpus(collection, PrepareConfig(val_fraction=0.01), volumes / "data/few")
    train, val = (np.fromfile(volumes / f"data/few/{split}.bin", "<u2") for split in ("train", "val"))
    whole = np.concatenate([train, val])
    assert (whole == 50_256).sum() == 12 and whole[-1] == 50_256
    assert len(val) == pytest.approx(0.01 * len(whole), rel=0.01)
    assert manifest["splits"]["val"]["tokens"] == len(val)
    manifest, _ = prepare_corpus(collection, PrepareConfig(val_fraction=0.1, split="content"), volumes / "data/more")
    val = np.fromfile(volumes / "data/more/val.bin", "<u2")
    assert val[-1] == 50_256 and manifest["splits"]["val"]["documents"] == (val == 50_256).sum()


def test_the_same_text_under_another_path_is_there_already(tmp_path: Path, volumes: Path, gpt2box: Command) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_bytes(TINYSHAKESPEARE.read_bytes()[:20_000])
    assert gpt2box("prepare", str(tmp_path / "a/text.txt")).returncode == 0
    assert "nothing to do" in gpt2box("prepare", str(tmp_path / "b/text.txt")).stderr


def test_two_at_once_are_refused(tmp_path: Path, volumes: Path) -> None:
    from gpt2box.utils.files import file_lock

    path = tmp_path / "a.txt"
    path.write_text(TINYSHAKESPEARE.read_text())
    with file_lock(volumes / "data/.long.lock", "x"), pytest.raises(BadInput, match="by another process"):
        prepare_corpus(
            open_own_files(find_files([str(path)])), PrepareConfig(val_fraction=0.1, workers=1), volumes / "data/long"
        )


def test_large_units_go_through_a_file(
    tmp_path: Path, ranks_file: Path, monkeypatch: pytest.MonkeyPatch, gpt2_tokenizer: Gpt2Tokenizer
) -> None:
    path = tmp_path / "line.txt"
    text = " ".join(TINYSHAKESPEARE.read_text().split()) * 4
    path.write_text(text)
    tokenize_workers.start_worker(ranks_file)
    plain = tokenize_workers.tokenize_unit(Unit(path, path.name, ""), 50_256, tmp_path / "spill")
    monkeypatch.setattr(tokenize_workers, "SPILL_BYTES", 100_000)
    spilled = tokenize_workers.tokenize_unit(Unit(path, path.name, ""), 50_256, tmp_path / "spill")
    assert isinstance(plain.tokens, np.ndarray) and spilled.tokens == tmp_path / "spill"
    for chunk in (plain, spilled):
        assert [ids.tobytes() for ids in chunk.documents()] == [joined(gpt2_tokenizer, [text])]
    assert plain.digests == spilled.digests


CHARACTERS = "'’ \n\t\r\x1c\x85\xa0\u3000aZéя9½²٣漢か。、！한🙂.,-\u0301ก$\u0870\U00010570\u1c89\u30fb\0"
PARTS = st.sampled_from([*CHARACTERS, "'s", "'ll", "  ", "\n\n", "👍🏽", "<|endoftext|>", "the "])


@settings(max_examples=400, deadline=None)
@given(st.lists(PARTS, max_size=60), st.integers(0, 60))
def test_bulk_encoding_gives_tiktokens_ids_wherever_the_text_is_cut(
    ranks_file: Path, parts: list[str], cut: int
) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_chunks, "CHUNK_CHARACTERS", 8)
        bulk = cached(ranks_file)
        found = [int(i) for ids in bulk.encode((text[:cut], text[cut:])) for i in ids]
    assert found == bulk.tokenizer.encode(text).tolist()


BULK: list[BulkEncoder] = []


def cached(ranks: Path) -> BulkEncoder:
    if not BULK:
        BULK.append(BulkEncoder(ranks))
    return BULK[0]


def test_the_locked_stacks_have_the_fast_tokenizer(ranks_file: Path) -> None:
    assert cached(ranks_file).fast is not None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=20), max_size=20))
def test_what_was_seen_is_known_again(rows: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DuplicateFilter, "RECENT", 5)
        seen, before = DuplicateFilter(b""), set()
        for row in rows:
            digests = [bytes([n]) + bytes(DIGEST_BYTES - 2) + bytes([n % 2]) for n in row]
            expected = [n not in before and row.index(n) == i for i, n in enumerate(row)]
            assert seen.mark_first(b"".join(digests)).tolist() == expected
            before |= set(row)


def test_too_little_text_says_so_and_enough_is_kept(volumes: Path, corpus: Path, gpt2box: Command) -> None:
    base = ["prepare", "openwebtext", "--from", str(corpus)]
    little = gpt2box(*base, "--max-docs", "20")
    assert little.returncode == 2 and "too little text" in little.stderr and "--val-fraction" in little.stderr
    enough = gpt2box(*base, "--max-docs", "20", "--val-fraction", "0.5")
    assert enough.returncode == 0, enough.stderr
    assert json.loads((volumes / "data/openwebtext-first-20/dataset.json").read_text())["splits"]["val"]["tokens"] > 64
