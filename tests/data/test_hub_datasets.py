"""Datasets of the Hub, from a server on the loopback that answers as the Hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt2box.data import corpus as collection
from gpt2box.data import hub_datasets, pretrained
from gpt2box.data.prepare import prepare
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.tokenize_workers import run_in_daemon_thread
from gpt2box.errors import Damaged, TryAgain
from tests.helpers.commands import Command
from tests.helpers.corpora import FILES


class Hub(http.server.ThreadingHTTPServer):
    """The corpus's files as the dataset someone/speeches and as a pinned one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.tokens: list[str | None] = []
        self.paths: list[str] = []
        self.served: list[str] = []
        self.cut_short = 0  # answers that break off half-way


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub_, path = self.server, self.path
        hub_.paths.append(path)
        hub_.tokens.append(self.headers.get("Authorization"))
        name = path.rpartition("/")[2]
        if path == "/api/datasets/someone/speeches/parquet":
            names = {"plain": {"train": [f"{hub_.url}/files/{n}" for n in hub_.files]}}
            return self.send(json.dumps(names).encode())
        if "/tree/" in path:
            digests = {n: hashlib.sha256(c).hexdigest() for n, c in hub_.files.items()}
            entries = [
                {
                    "type": "file",
                    "path": f"plain_text/{n}",
                    "size": len(c),
                    "lfs": {"oid": digests[n]},
                }
                for n, c in hub_.files.items()
            ]
            return self.send(json.dumps(entries).encode())
        if name in hub_.files:
            hub_.served.append(name)
            content = hub_.files[name]
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            return self.send(content[start:], 206 if start else 200, body)
        self.send_error(404)

    def send(self, content: bytes, status: int = 200, body: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.server.cut_short and len(content) > 10_000:
            self.server.cut_short -= 1
            content = content[: len(content) // 2]
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    running = Hub(corpus)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_dataset_of_the_hub_comes_file_by_file(
    volumes: Path,
    corpus: Path,
    server: Hub,
    gpt2box: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = gpt2box("prepare", "hub:someone/speeches", "--val-fraction", "0.1")
    assert done.returncode == 0, done.stderr
    assert set(server.tokens) == {"Bearer hf_secret"}
    assert not list((volumes / "data/raw").rglob("*.parquet"))  # dropped when they were done with
    local = gpt2box("prepare", "openwebtext", "--from", str(corpus), "--val-fraction", "0.1", "--name", "local")
    assert local.returncode == 0
    assert (volumes / "data/someone-speeches/train.bin").read_bytes() == (volumes / "data/local/train.bin").read_bytes()
    part = gpt2box("prepare", "hub:someone/speeches", "--shards", "4:6", "--keep-raw")
    assert part.returncode == 0, part.stderr
    assert len(list((volumes / "data/raw").rglob("*.parquet"))) == 2
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = gpt2box("prepare", "hub:someone/other")
    assert offline.returncode == 75 and "HF_HUB_OFFLINE is set" in offline.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["hub:someone/nothing"], "HTTP 404"),
        (["hub:someone/speeches", "--hub-split", "test"], "one of: train"),
        (["hub:someone/speeches", "--hub-config", "fancy"], "one of: plain"),
        (["hub:someone/speeches", "--shards", "6:9"], "not so many files"),
        (["hub:someone/speeches", "--text-column", "body"], "one of: id, text"),
    ],
)
def test_what_the_hub_does_not_have_is_said(
    volumes: Path, server: Hub, gpt2box: Command, arguments: list[str], part: str
) -> None:
    done = gpt2box("prepare", *arguments)
    assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.fixture
def pinned(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The small corpus in OpenWebText's place."""
    total = sum(map(len, server.files.values()))
    pin = hub_datasets.Pinned("someone/pinned", "abc", "plain_text", FILES, total, 7222)
    monkeypatch.setattr(hub_datasets, "OPENWEBTEXT", pin)
    monkeypatch.setattr(hub_datasets, "KNOWN_FILES", {})
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return server


def test_two_jobs_that_need_the_same_files_do_not_take_them_from_each_other(
    server: Hub, volumes: Path, started: Command
) -> None:
    results = {}

    def job(name: str) -> None:
        results[name] = started("prepare", "hub:someone/speeches", "--name", name, "--workers", "1")

    threads = [threading.Thread(target=job, args=[name]) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.returncode for done in results.values()] == [0, 0], results
    assert (volumes / "data/a/train.bin").read_bytes() == (volumes / "data/b/train.bin").read_bytes()
    assert not list((volumes / "data/raw/someone--speeches").glob("**/*.parquet"))


OTHER_JOB = """
import sys
from gpt2box.data import corpus as collection
first, second = collection.open_hub_dataset("someone/speeches", "", "train", slice(0, 2), False).sources
second.fetch()
print("has the second", flush=True)
sys.stdin.readline()
first.fetch()  # which waits for the other job
first.discard()
second.discard()
print("done", flush=True)
"""


@contextmanager
def other_job() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OTHER_JOB]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            yield other
        except BaseException:
            other.kill()  # else it would be waited for
            raise


def test_two_jobs_that_wait_for_each_others_next_file_both_end(server: Hub, volumes: Path) -> None:
    first, second = collection.open_hub_dataset("someone/speeches", "", "train", slice(0, 2), False).sources
    with other_job() as other:
        assert other.stdin and other.stdout
        assert other.stdout.readline() == "has the second\n"
        assert first.fetch().exists()
        ahead = run_in_daemon_thread(second.fetch)
        other.stdin.write("go on\n")
        other.stdin.flush()
        time.sleep(0.3)  # both wait, as far as can be seen from here
        assert not ahead.done()
        first.discard()
        assert ahead.result(timeout=60).exists()
        second.discard()
        assert other.stdout.readline() == "done\n"
    assert other.returncode == 0


def test_a_job_that_waits_for_another_finishes_what_that_one_waits_for(server: Hub, volumes: Path) -> None:
    with other_job() as other:
        assert other.stdin and other.stdout
        assert other.stdout.readline() == "has the second\n"
        options = PrepareConfig(workers=1)
        job = threading.Thread(target=prepare, args=[["hub:someone/speeches"], options], daemon=True)
        job.start()
        first = volumes / "data/raw/someone--speeches/passing/plain-train-00000.parquet"
        while not first.exists():
            time.sleep(0.01)
        other.stdin.write("go on\n")
        other.stdin.flush()
        job.join(timeout=120)
        assert not job.is_alive()
        assert other.stdout.readline() == "done\n"
    assert (volumes / "data/someone-speeches/train.bin").exists()


def test_downloads_that_break_off_go_on(volumes: Path, pinned: Hub) -> None:
    pinned.cut_short = 5
    prepare(["openwebtext"], PrepareConfig(split="nanogpt", workers=1))
    assert len(pinned.served) > FILES
    manifest = json.loads((volumes / "data/openwebtext/dataset.json").read_text())
    assert sum(part["documents"] for part in manifest["splits"].values()) == 7222
    assert manifest["source"] == "OpenWebText, someone/pinned@abc"


def test_other_bytes_than_the_pinned_are_never_taken(volumes: Path, pinned: Hub) -> None:
    hub_datasets.list_openwebtext_sources(keep_raw=False)  # the list is kept
    name = next(iter(pinned.files))
    pinned.files[name] = pinned.files[name][:-1] + b"X"
    with pytest.raises(TryAgain, match="sha256"):
        prepare(["openwebtext"], PrepareConfig(workers=1))
    assert not (volumes / "data/openwebtext").exists()
    (volumes / "data/raw/openwebtext/files.json").write_text(json.dumps({"revision": "abc", "files": {}}))
    with pytest.raises(Damaged, match="lacks 'train-00000"):
        prepare(["openwebtext"], PrepareConfig(workers=1))


def test_without_network_it_says_so(volumes: Path, pinned: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TryAgain, match="refused"):
        prepare(["openwebtext"], PrepareConfig(workers=1))


def test_weights_without_a_hash_of_our_own_have_the_hubs(
    volumes: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {"model.safetensors": b"weights" * 1000}
    folder = pretrained.pretrained_folder("gpt2-large")
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 1000
    assert f"/{pretrained.HUB_REVISIONS['gpt2-large']}/" in server.paths[-1]
    with pytest.raises(Damaged, match="the Hub's gpt2-xl has sha256"):
        pretrained.pretrained_folder("gpt2-xl")
    assert not (volumes / "models/gpt2-xl").exists()


def test_threads_that_come_first_together_have_one_lock_file(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def first(folder: Path) -> int:
        together.wait()
        return hub_datasets.open_lock_file(folder)

    with ThreadPoolExecutor(8) as pool:
        for number in range(30):
            assert len(set(pool.map(first, [tmp_path / str(number)] * 8))) == 1
