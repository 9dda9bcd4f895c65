"""Models of the Hub by name, from a server on the loopback that answers as the Hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2box.data import hub_datasets
from gpt2box.data.dataset import TokenFile, open_dataset
from gpt2box.data.hub_models import hub_model
from gpt2box.data.prepare import prepare
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.tokenizer import Gpt2Tokenizer
from gpt2box.errors import BadInput, Damaged, TryAgain
from gpt2box.inference.model_loader import find_model, load_model
from tests.helpers.commands import Command
from tests.helpers.settings import TINYSHAKESPEARE, options

COMMIT = "c0ffee" * 6 + "abcd"


class Hub(http.server.ThreadingHTTPServer):
    """The repository someone/small."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = files
        self.served: list[str] = []
        self.lies: dict[str, bytes] = {}  # other bytes than are listed
        self.cut_short = 0


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        files = self.server.files
        if self.path in (f"/api/models/someone/small/revision/{r}" for r in ("main", "v1")):
            return self.send(json.dumps({"sha": COMMIT}).encode())
        if self.path == f"/api/models/someone/small/tree/{COMMIT}":
            entries = []
            for name, content in files.items():
                git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                entry = {"type": "file", "path": name, "size": len(content), "oid": git}
                if name.endswith((".safetensors", ".bin")):
                    entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest()}  # type: ignore[assignment]
                entries.append(entry)
            return self.send(json.dumps(entries).encode())
        name = self.path.removeprefix(f"/someone/small/resolve/{COMMIT}/")
        if name in files:
            self.server.served.append(name)
            content = self.server.lies.get(name, files[name])
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            return self.send(content[start:], 206 if start else 200)
        self.send_error(404)

    def send(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.cut_short and len(content) > 100_000:
            self.server.cut_short -= 1
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: Gpt2Tokenizer) -> dict[str, bytes]:
    """A small model as transformers writes it, in shards, with GPT-2's tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(3)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=50_257))
    theirs.save_pretrained(folder, max_shard_size="6MB")
    gpt2_tokenizer.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    running = Hub(dict(files))
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_address[1]}")
    monkeypatch.setattr(hub_datasets, "DOWNLOAD_ATTEMPTS", 1)
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_model_of_the_hub_is_fine_tuned_and_sampled_and_needs_no_network_after(
    volumes: Path, server: Hub, gpt2box: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = options(
        dataset="bpe", init_from="someone/small", n_layer=2, max_steps=1, eval_interval=1, eval_windows=2
    )
    done = gpt2box("train", *settings, "--name", "tuned")
    assert done.returncode == 0, done.stderr
    folder = volumes / "models" / "someone--small"
    assert json.loads((folder / "hub.json").read_text()) == {"repo": "someone/small", "asked": "main", "commit": COMMIT}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = gpt2box("sample", "someone/small", "--max-new-tokens", "5", "--prompt", "Ay")
    assert text.returncode == 0 and text.stdout.startswith("Ay"), text.stderr
    model, words = load_model(find_model("someone/small", "best"), "cpu")
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = torch.arange(20)[None]
    assert words.vocab_size == 50_257
    assert (model.eval().logits(model.hidden_states(ids)) - theirs(ids).logits).abs().max() < 1e-5


def test_a_broken_download_goes_on_and_half_a_model_is_never_seen(volumes: Path, server: Hub) -> None:
    server.cut_short = 1
    with pytest.raises(TryAgain):
        hub_model("someone/small")
    assert not (volumes / "models" / "someone--small").exists()
    before = list(server.served)
    folder = hub_model("someone/small@v1")
    assert (folder / "config.json").exists() and "config.json" in before
    assert "config.json" not in server.served[len(before) :]  # it was there already
    with pytest.raises(BadInput, match="someone/small at v1"):
        hub_model("someone/small@v2")


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_other_bytes_than_the_hub_lists_are_refused(volumes: Path, server: Hub, name: str) -> None:
    assert name in server.files
    content = bytearray(server.files[name])
    content[-5] ^= 1
    server.lies[name] = bytes(content)
    with pytest.raises((Damaged, TryAgain), match=r"hash|sha256"):
        hub_model("someone/small")
    assert not (volumes / "models" / "someone--small").exists()


def test_what_is_not_there_or_not_gpt2_or_pickled_is_said(volumes: Path, server: Hub) -> None:
    with pytest.raises(BadInput, match="HTTP 404"):
        hub_model("someone/none")
    config = server.files["config.json"]
    server.files["config.json"] = config.replace(b'"gpt2"', b'"llama"')
    with pytest.raises(BadInput, match="model_type 'llama'"):
        hub_model("someone/small")
    server.files["config.json"] = config
    weights = [name for name in server.files if "safetensors" in name]
    for name in weights:
        del server.files[name]
    server.files["pytorch_model.bin"] = b"pickle"
    with pytest.raises(BadInput, match="no safetensors but pickled weights"):
        hub_model("someone/small")
    assert not (volumes / "models" / "someone--small").exists()


def test_the_tokenizer_alone_is_brought_for_a_text(
    volumes: Path, tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ByteLevelBPETokenizer()
    made.train([str(TINYSHAKESPEARE)], vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    made.save_model(str(tmp_path))
    server.files |= {name: (tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    manifest, _ = prepare([str(TINYSHAKESPEARE)], PrepareConfig("someone/small@v1"))
    assert {*server.served} == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert manifest["tokenizer"]["vocab_size"] == 500 and not list((volumes / "models").glob("*"))
    dataset = open_dataset(volumes / "data" / "tinyshakespeare-small")
    ids = TokenFile(dataset.folder / "train.bin").read(0, 1000)
    expected = made.encode(TINYSHAKESPEARE.read_text()[:20_000]).ids
    assert ids.tolist() == expected[:1000]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not prepare([str(TINYSHAKESPEARE)], PrepareConfig("someone/small"))[1]  # there already, both
    with pytest.raises(BadInput, match="--tokenizer nothing"):
        prepare([str(TINYSHAKESPEARE)], PrepareConfig("nothing"))
