"""`gpt2box push`: the Hub's own client against a local stand-in for the Hub."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import string
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load

from gpt2box.data.tokenizer import build_char_tokenizer
from gpt2box.errors import BadInput, Gpt2boxError, TryAgain
from gpt2box.export.export import export_model
from gpt2box.export.push import check_name, push
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.commands import Command
from tests.helpers.models import tiny_model, write_checkpoint
from tests.helpers.settings import TINY

TOKEN = "hf_secret0123456789"


class Hub(http.server.ThreadingHTTPServer):
    """Stand-in for the Hub: repositories with their visibility and files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}  # by sha256
        self.tokens: set[str | None] = set()
        self.requests: list[str] = []
        self.failing: dict[str, int] = {}  # HTTP status by the end of the path


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def answer(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        for end, status in hub.failing.items():
            if path.endswith(end):
                return self.send({"error": f"not for {self.headers.get('Authorization')}"}, status)
        if path.startswith("/lfs/"):
            assert hashlib.sha256(content).hexdigest() == path.removeprefix("/lfs/")
            hub.stored[path.removeprefix("/lfs/")] = content
            return self.send({})
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if path.startswith(("/api/models/", "/api/repos/", "/alice/")):  # the client sends its token to these only
            hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked['organization']}/{asked['name']}"
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            status = 409 if repo in hub.private else 200
            hub.private.setdefault(repo, private)
            return self.send({"url": f"{hub.url}/{repo}"}, status)
        if path.startswith("/api/models/") and "/preupload/" in path:
            names = [file["path"] for file in json.loads(content)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return self.send({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**file, "actions": {"upload": {"href": f"{hub.url}/lfs/{file['oid']}"}}}
                for file in json.loads(content)["objects"]
            ]
            return self.send({"objects": objects, "transfer": "basic"})
        if path.startswith("/api/models/") and "/commit/" in path:
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.stored[value["oid"]]
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            return self.send({"commitUrl": f"{hub.url}/{repo}/commit/abc", "commitOid": "abc", "success": True})
        repo = path.removeprefix("/api/models/")
        if repo in hub.private:
            return self.send({"id": repo, "private": hub.private[repo], "sha": "abc", "siblings": [], "tags": []})
        return self.send({"error": "Repository not found"}, 404, "RepoNotFound")

    do_GET = do_POST = do_PUT = answer

    def send(self, content: object, status: int = 200, code: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    running = Hub()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # hides a token saved there
    # The stand-in lacks the Hub's Xet storage. The client may have read the variable already.
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_push_uploads_the_export_of_a_run_to_a_private_repository(volumes: Path, gpt2box: Command, hub: Hub) -> None:
    run_job(None, {key: str(value) for key, value in {**TINY, "name": "run", "max_steps": 5}.items()}, StopRequest())
    done = gpt2box("push", "run", "alice/small", "--license", "mit", "--dtype", "float16")
    assert done.returncode == 0 and done.stdout == f"{hub.url}/alice/small\n", done.stderr
    assert hub.private == {"alice/small": True} and hub.tokens == {f"Bearer {TOKEN}"}
    exported_folder = export_model(
        volumes / "runs" / "run" / "checkpoints" / "best", "huggingface", "float16", None, "mit"
    )
    exported = {path.name: path.read_bytes() for path in exported_folder.iterdir()}
    assert hub.files.keys() == exported.keys()
    assert [name for name in exported if hub.files[name] != exported[name]] == ["README.md"]
    card = hub.files["README.md"].decode()
    assert "# alice/small" in card and 'model="alice/small"' in card and 'license: "mit"' in card
    assert "| val_loss |" in card and str(volumes) not in card  # the text's name without its folder
    assert load(hub.files["model.safetensors"])["transformer.wte.weight"].shape == (65, 32)
    assert f"{len(exported)} files" in done.stderr and f"{len(exported['model.safetensors']):,} bytes" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert [path.name for path in exported_folder.parent.iterdir()] == ["run-float16"]


@pytest.fixture
def model(volumes: Path) -> Path:
    """Write a small model and return its folder."""
    folder = volumes / "models" / "small"
    folder.mkdir(parents=True)
    network, tokenizer = tiny_model(), build_char_tokenizer([string.printable], end_of_text=True)
    write_checkpoint(folder, network, tokenizer)
    return folder


def test_push_needs_public_for_a_public_repository_and_keeps_a_private_one_private(
    model: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    push(model, "alice/seen", "float32", "", public=True)
    assert hub.private == {"alice/seen": False}
    with pytest.raises(BadInput, match="there already, and public"):
        push(model, "alice/seen", "float32", "", public=False)
    hub.private["alice/seen"] = True
    push(model, "alice/seen", "float32", "", public=True)
    assert hub.private["alice/seen"] and "stays private" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "status", "kind"),
    [
        ("/alice/new", 401, BadInput),
        ("/repos/create", 403, BadInput),
        ("/batch", 400, BadInput),
        ("/new", 502, TryAgain),
    ],
)
def test_an_error_from_the_hub_is_reported_without_the_token(
    model: Path, hub: Hub, end: str, status: int, kind: type[Gpt2boxError]
) -> None:
    hub.failing = {end: status}
    with pytest.raises(kind, match=f"HTTP {status}.*not for Bearer hf_…") as raised:
        push(model, "alice/new", "float32", "", public=False)
    assert (TOKEN not in str(raised.value) and raised.value.next_step) or status == 400
    assert not hub.files and [path.name for path in model.parent.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("variables", "kind", "part"),
    [
        ({"HF_TOKEN": ""}, BadInput, "no token for the Hub"),
        ({"HF_HUB_OFFLINE": "1"}, TryAgain, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, TryAgain, "http://127.0.0.1:9: .*refused"),
    ],
)
def test_a_missing_token_or_network_fails_before_the_export(
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    kind: type[Gpt2boxError],
    part: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind, match=part) as raised:
        push(tmp_path / "no-model", "alice/small", "float32", "", public=False)
    assert raised.value.next_step and not hub.requests


@pytest.mark.parametrize(
    "name", ["small", "a/b/c", "alice/", "alice/a--b", "-a/b", "alice/a..b", "alice/x.git", "a/ b"]
)
def test_invalid_repository_names_are_refused(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]

    with pytest.raises(BadInput, match="no repository can be called"):
        check_name(name)
    if "/" in name:
        with pytest.raises(HFValidationError):
            validate_repo_id(name)
