"""Files of many kinds give the same documents; what cannot be read is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2box.data import readers
from gpt2box.data.sources import load_texts
from gpt2box.errors import BadInput, Damaged
from tests.helpers.commands import Command
from tests.helpers.settings import TINYSHAKESPEARE

TEXTS = [
    *TINYSHAKESPEARE.read_text().split("\n\n")[:40],
    'a "quoted", comma;\ttab\nand line',
    "naïve Ω 漢字 🙂",
    " \n",
    "z",
]


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)  # type: ignore[no-any-return]


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def written(path: Path, texts: list[str]) -> Path:
    """The texts as a file whose kind its name says."""
    kind = readers.file_kind(path)
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        return path
    if kind in (".csv", ".tsv"):
        stream = io.StringIO()
        table = csv.DictWriter(stream, ["id", "text"], delimiter="\t" if kind == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)
        content = "\ufeff" + stream.getvalue()  # as spreadsheets write it
    elif kind == ".json":
        content = json.dumps(rows, indent=1)
    else:
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    path.write_bytes(PACK.get(path.suffix, bytes)(content.encode()))
    return path


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet"]
    + [f"a.jsonl{packed}" for packed in PACK]
    + ["a.csv.gz"],
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, TEXTS)
    corpus = load_texts([str(path)])
    assert corpus.texts == [text for text in TEXTS if text.strip()]
    assert corpus.empty == 1 and corpus.name == "a"
    assert load_texts([str(path)], column="text").texts == corpus.texts


@pytest.mark.parametrize("name", ["a.txt.gz", "a.md.zst", "a.txt.xz", "a.bz2"])
def test_packed_plain_texts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PACK[path.suffix](b"\xef\xbb\xbfone\r\ntwo\rthree\n"))
    assert load_texts([str(path)]).texts == ["one\ntwo\nthree\n"]


def test_duplicates_are_left_out_unless_wanted(tmp_path: Path, volumes: Path, gpt2box: Command) -> None:
    path = written(tmp_path / "a.jsonl", TEXTS + TEXTS)
    once, twice = load_texts([str(path)]), load_texts([str(path)], keep_duplicates=True)
    assert once.duplicates == len(once.texts) == 43 and len(twice.texts) == 86
    done = gpt2box("prepare", str(path))
    assert done.returncode == 0 and "left out: 43 exact duplicates, 2 without text" in done.stderr


def test_patterns_folders_and_standard_input(tmp_path: Path, volumes: Path, gpt2box: Command) -> None:
    for name in ("b", "a", "c/d"):
        path = tmp_path / "texts" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} " * 100)
    (tmp_path / "texts" / "settings.json").write_text("{}")
    (tmp_path / "texts" / "picture.png").write_bytes(bytes(100))
    assert load_texts([str(tmp_path / "texts/**/*.txt")]).texts == ["a " * 100, "b " * 100, "c/d " * 100]
    assert len(load_texts([str(tmp_path / "texts")]).texts) == 3
    done = gpt2box("prepare", "-", "--name", "typed", input=TINYSHAKESPEARE.read_text())
    assert done.returncode == 0, done.stderr
    again = gpt2box("prepare", "-", "--name", "typed", input=TINYSHAKESPEARE.read_text())
    assert "nothing to do" in again.stderr
    assert (volumes / "data/typed/train.bin").read_bytes() == (volumes / "data/bpe/train.bin").read_bytes()
    lines = "\n".join(json.dumps({"body": text}) for text in TEXTS)
    records_in = gpt2box("prepare", "-", "--text-column", "body", input=lines)
    assert records_in.returncode == 0 and "documents: " in records_in.stderr, records_in.stderr
    assert sorted(path.name for path in (volumes / "data/raw").glob(".*")) == []


@pytest.mark.parametrize(
    ("name", "content", "error", "part"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', BadInput, "a.jsonl, line 2"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', BadInput, "line 2: no column 'text'"),
        ("a.jsonl", b'{"text": 3}', BadInput, "line 1: the text is int '3'"),
        ("a.jsonl", b'{"text": "caf\xe9"}', BadInput, "is not UTF-8: byte 0xe9"),
        ("a.json", b"[1, 2", BadInput, "a.json"),
        ("a.csv", b"name,age\nx,3\n", BadInput, "one of: name, age"),
        ("a.csv", b"id,text\n3,x\n4\n", BadInput, "row 3: 1 fields"),
        ("a.csv", b"", BadInput, "is empty"),
        ("a.csv", b'text\nwhole\n"never closed\nnext\n', BadInput, "up to line 4"),
        ("a.json", b'[{"text": "one"},\n {"text" "two"}]', BadInput, "line 2"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', BadInput, "offset 26, line 2"),
        ("a.txt", "text".encode("utf-16"), BadInput, "UTF-16"),
        ("a.parquet", b"PAR1 and no more", Damaged, "no whole Parquet file"),
        ("a.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-20], Damaged, "cannot be read"),
        ("a.txt.gz", b"text", Damaged, "cannot be read"),
        ("a.txt.zst", zstd(b"text " * 999)[:-5], Damaged, "cannot be read"),
        ("a.txt.xz", b"text", Damaged, "cannot be read"),
        ("a.txt", b"text\0", BadInput, "binary: a zero byte at offset 4"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], part: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match="a\\.") as raised:
        load_texts([str(path)])
    assert part in str(raised.value)


SEQUENCES = ["a", "\r\n", "\r", "é", "漢", "🙂", "\n"]


@given(st.lists(st.sampled_from(SEQUENCES).map(str.encode), max_size=30), st.booleans())
def test_blocks_do_not_show(parts: list[bytes], mark: bool) -> None:
    content = (b"\xef\xbb\xbf" if mark else b"") + b"".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", 3)
        found = "".join(readers.decode_text(io.BytesIO(content), Path("a.txt")))
    assert found == io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()


@given(st.binary(max_size=40).map(lambda content: content.replace(b"\0", b"a")))
def test_the_first_bad_byte_is_named_wherever_blocks_end(content: bytes) -> None:
    try:
        content.decode("utf-8")
        expected = ""
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        expected = f"byte 0x{content[error.start]:02x} at offset {error.start:,}, line {line:,}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", 3)
        try:
            "".join(readers.decode_text(io.BytesIO(content), Path("a.txt")))
            found = ""
        except BadInput as error:
            found = error.found
    assert bool(found) == bool(expected) and expected in found


def test_a_row_with_too_many_fields_is_refused_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "commas.csv"
    path.write_text("text\none field\nthis one, alas, has three\n")
    with pytest.raises(BadInput, match=r"row 3: 3 fields"):
        load_texts([str(path)])


def test_records_nested_beyond_reason_are_named(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(BadInput, match=r"deep\.jsonl, line 1"):
        load_texts([str(path)])
