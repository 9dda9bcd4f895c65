"""Files that are written whole, beside whatever else happens at their path."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2box.errors import BadInput
from gpt2box.utils.files import write_atomically

BYTES = 2_000_000


def writes(path: Path, letter: bytes) -> None:
    for _ in range(30):
        write_atomically(path, letter * BYTES)


def test_processes_that_write_one_path_never_show_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_atomically(path, b"a" * BYTES)
    fresh = multiprocessing.get_context("spawn")
    writers = [fresh.Process(target=writes, args=(path, letter)) for letter in (b"a", b"b", b"c")]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        content = path.read_bytes()
        assert len(content) == BYTES and content.count(content[:1]) == BYTES
        seen += 1
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and seen
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]


def test_what_fails_half_way_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    write_atomically(path, "before")

    def parts() -> Iterator[str]:
        yield "half"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_atomically(path, parts())
    assert path.read_text() == "before" and [found.name for found in tmp_path.iterdir()] == ["samples.txt"]


def test_what_a_killed_process_left_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / ".plan.json.tmp").write_text("longer than what is written now")
    write_atomically(tmp_path / "plan.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"plan.json": "new"}


def test_the_mode_is_the_usual_one(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "plan.json", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    path = Path("report.html")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        socket.socket(socket.AF_UNIX).bind(str(path))
    before = path.lstat()
    with pytest.raises(BadInput, match="is no file"):
        write_atomically(path, "text")
    assert path.lstat() == before


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_lies_in_the_temporary_files_place_goes(tmp_path: Path, kind: str) -> None:
    other, temporary = tmp_path / "other", tmp_path / ".report.html.tmp"
    other.write_text("somebody's")
    if kind == "link":
        temporary.symlink_to(other)
    else:
        os.mkfifo(temporary)
    write_atomically(tmp_path / "report.html", "text")
    assert (tmp_path / "report.html").read_text() == "text" and other.read_text() == "somebody's"
