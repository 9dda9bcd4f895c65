"""Files from outside, from a server on the loopback interface."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gpt2box.data.downloads import Asset, Sdist, fetch
from gpt2box.errors import Damaged, TryAgain, VolumeUnwritable

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges; /short ends half-way, /wrong has other bytes."""

    requests: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.requests.append((self.path, wanted))
        if self.path == "/missing":
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        body = CONTENT[::-1] if self.path == "/wrong" else CONTENT
        end = len(CONTENT) // 2 if self.path == "/short" and not wanted else len(CONTENT)
        self.wfile.write(body[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.requests = []
    instance = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{instance.server_port}"
    instance.shutdown()
    instance.server_close()


def asset(url: str, sdist: Sdist | None = None) -> Asset:
    return Asset("file.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), url, sdist)


def test_a_download_is_verified_then_named(server: str, tmp_path: Path) -> None:
    assert fetch(asset(f"{server}/file"), tmp_path).read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_an_interrupted_download_goes_on_where_it_stopped(server: str, tmp_path: Path) -> None:
    with pytest.raises(TryAgain, match="connection ended"):
        fetch(asset(f"{server}/short"), tmp_path)
    assert fetch(asset(f"{server}/short"), tmp_path).read_bytes() == CONTENT
    assert Handler.requests[-1] == ("/short", f"bytes={len(CONTENT) // 2}-")


def test_a_copy_that_is_there_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert fetch(asset("http://127.0.0.1:9/none"), tmp_path).read_bytes() == CONTENT


def test_a_wrong_copy_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"other")
    with pytest.raises(Damaged) as raised:
        fetch(asset("http://127.0.0.1:9/none"), tmp_path)
    text = str(raised.value)
    assert hashlib.sha256(b"other").hexdigest() in text and hashlib.sha256(CONTENT).hexdigest() in text
    assert str(tmp_path / "file.bin") in text
    assert (tmp_path / "file.bin").read_bytes() == b"other"


def test_wrong_bytes_from_the_network_get_no_name(server: str, tmp_path: Path) -> None:
    with pytest.raises(TryAgain, match="sha256"):
        fetch(asset(f"{server}/wrong"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_any_source_each_is_named_with_what_to_put_where(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(TryAgain) as raised:
        fetch(asset(f"{server}/missing", Sdist("no-such-package-gpt2box==1.0", "0" * 64)), tmp_path)
    text = str(raised.value)
    assert raised.value.exit_code == 75
    assert "HTTP 404" in text and "no-such-package-gpt2box==1.0" in text
    assert f"put a copy at {tmp_path / 'file.bin'}" in text


def test_a_folder_that_cannot_be_made_is_an_unwritable_volume(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VolumeUnwritable):
        fetch(asset("http://127.0.0.1:9/none"), tmp_path / "file" / "raw")
