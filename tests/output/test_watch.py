"""The dashboard: what it shows of runs that come, grow, begin anew and go, to whom, and in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gpt2box.dashboard.server import create_app, make_access_policy
from gpt2box.dashboard.state import ClientState, DashboardState
from gpt2box.report.page import write_report
from gpt2box.runs.history import CurveBuffer, read_history
from gpt2box.utils.files import locked, write_atomically
from tests.helpers.browser import Browser, chromium
from tests.helpers.commands import Command

TOKEN = "a-token_of_the-test0"


def line(step: int, **changes: object) -> str:
    row = {
        "step": step, "kind": "train", "loss": 4 - step / 1000, "learning_rate": 1e-3, "grad_norm": 0.5,
        "tokens_per_sec": 5000.0, "peak_memory_bytes": 2**30, "skipped_steps": 0, "mfu": None, "time": 1e9 + step,
    }  # fmt: skip
    return json.dumps({**row, **changes}) + "\n"


def evaluated(step: int, val_loss: float) -> str:
    return (
        json.dumps({"step": step, "kind": "eval", "val_loss": val_loss, "val_set": "v", "best": True, "time": 1e9})
        + "\n"
    )


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT2BOX_VOLUMES", str(tmp_path))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def run_of(runs: Path, name: str, steps: int) -> Path:
    """A run's folder as training leaves it half-way, but for checkpoints."""
    folder = runs / name
    (folder / "samples").mkdir(parents=True)
    (folder / "plan.json").write_text('{"max_steps": 100000, "tokens_per_step": 64}')
    (folder / "config.yaml").write_text("dataset: text\n")
    (folder / ".lock").touch()
    (folder / "log.txt").write_text("2026-01-01 00:00:00  it began\n")
    (folder / "metrics.jsonl").write_text(evaluated(0, 4.5) + "".join(line(step) for step in range(1, steps + 1)))
    return folder


def steps(answer: dict[str, Any]) -> list[int]:
    return answer["run"]["curves"]["charts"][0]["lines"][0]["step"]  # type: ignore[no-any-return]


def test_only_what_is_new_is_handed_out_also_when_the_trainer_begins_anew(runs: Path) -> None:
    watch = DashboardState()
    assert watch.updates(ClientState()) == {"runs": [], "cards": watch.read_gpus(), "run": None}
    folder = run_of(runs, "a", 3)
    first = watch.updates(ClientState())["run"]
    assert first["curves"]["whole"] and steps({"run": first}) == [1, 2, 3] and "it began" in first["log"]["text"]
    known = ClientState(
        curves=first["curves"]["version"], log=first["log"]["version"], samples=first["samples"]["version"]
    )
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line(4) + line(5)[:20])
        file.flush()
        (folder / "samples/step-00000004.txt").write_text("To be\n")
        second = watch.updates(known)["run"]
        assert not second["curves"]["whole"] and steps({"run": second}) == [4], "not the line that is being written"
        assert second["log"] is None and second["samples"]["text"] == "To be\n"
        known = ClientState(curves=second["curves"]["version"])
        file.write(line(5)[20:])
    assert steps(watch.updates(known)) == [5]
    write_atomically(folder / "metrics.jsonl", line(1) + line(2))  # as a run that goes on from step 2 does
    again = watch.updates(known)
    assert again["run"]["curves"]["whole"] and steps(again) == [1, 2]
    shutil.rmtree(folder)
    assert watch.updates(ClientState(run="a"))["run"] is None and watch.updates(known)["runs"] == []


def test_the_run_that_is_trained_comes_first_and_a_torn_one_is_shown(runs: Path) -> None:
    for name in ("old", "going", "torn"):
        run_of(runs, name, 2)
    (runs / "torn/plan.json").write_text('{"max_st')
    (runs / "torn/metrics.jsonl").write_bytes(b'{"step": 1, "kind": "train", "lo\n\xff\0\n[]\n' + line(7).encode())
    (runs / "torn/samples/step-00000007.txt").write_bytes(b"\xff</script>")
    watch = DashboardState()
    with locked(runs / "going/.lock", "it"):
        answer = watch.updates(ClientState())
        assert (
            answer["run"]["name"] == answer["runs"][0]["name"] == "going" and answer["runs"][0]["state"] == "training"
        )
        figures = dict(answer["run"]["figures"])
    assert figures["step"] == "2 of 100,000" and figures["loss"] == "3.9980" and figures["time left"] == "21m 20s"
    assert "ago" in figures["last figure"], "it was long ago"
    assert {run["name"]: run["state"] for run in watch.updates(ClientState())["runs"]}["going"] == "stopped"
    torn = watch.updates(ClientState(run="torn"))
    assert torn["run"]["state"] == "damaged" and steps(torn) == [7] and "</script>" in torn["run"]["samples"]["text"]
    assert watch.updates(ClientState(run="../old"))["run"] is None


def test_a_long_file_is_read_as_line_by_line_only_faster(tmp_path: Path) -> None:
    lines = [line(step) + (evaluated(step, 3.0) if step % 7 == 0 else "") for step in range(1, 9001)]
    lines[100] = line(101, loss=None)
    for text in ("".join(lines), "".join([*lines[:50], '{"step": 5, "ki\n', line(51, loss=float("nan")), *lines[51:]])):
        assert len(text) > 1 << 20
        (tmp_path / "metrics.jsonl").write_text(text)
        fast, slow = read_history(tmp_path / "metrics.jsonl"), CurveBuffer()
        slow._add_row_by_row(text.encode())
        other = slow.to_history()
        assert (fast.rows, fast.non_finite, fast.val_sets) == (other.rows, other.non_finite, other.val_sets)
        assert fast.curves.keys() == other.curves.keys() and len(fast.curves["val_loss"].step) == 9000 // 7
        for name, curve in fast.curves.items():
            assert curve.value.tolist() == other.curves[name].value.tolist()


@pytest.fixture
def serve(runs: Path) -> Iterator[Any]:
    """Starts the real server on a port that is free; returns the port."""
    servers = []

    def start(token: str | None = None) -> int:
        listening = socket.create_server(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        settings = uvicorn.Config(
            create_app(make_access_policy("127.0.0.1", port, token, False)), log_level="warning", access_log=False
        )
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        servers.append((server, thread))
        return port

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode("utf-8", errors="replace")
    connection.close()
    return answer, body


def test_the_page_is_for_this_machine_read_only_and_loads_nothing_else(runs: Path, serve: Any) -> None:
    run_of(runs, "a", 2)
    port = serve()
    answer, page = ask(port, "/")
    assert answer.status == 200 and "default-src 'self'" in str(answer.headers["content-security-policy"])
    named = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(named) == 7 and all(ask(port, f"/{name}")[0].status == 200 for name in named)
    answer, body = ask(port, "/api/now?run=a", Host="localhost:8080")
    assert answer.status == 200 and json.loads(body)["run"]["name"] == "a"
    for name in ("evil.example", "127.0.0.1.evil.example:8080", "[::1", "0.0.0.0"):
        answer, body = ask(port, "/api/now", Host=name)
        assert answer.status == 421 and "runs" not in body, f"a page of another site, as {name}"
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert ask(port, "/api/now", method)[0].status == 405
    for path in ("/../page.py", "/%2e%2e/page.py", "/..%2fpage.py", "/nothing", "/api/nothing"):
        assert ask(port, path)[0].status == 404


def test_with_a_token_only_who_has_it_comes_in(runs: Path, serve: Any) -> None:
    port = serve(TOKEN)
    cookie = f"gpt2box-{port}"
    for path in ("/", "/api/now", "/page.js", "/?token=", "/?token=a-token_of_the-test1"):
        assert ask(port, path, Cookie=f"{cookie}=wrong")[0].status == 401
    answer, _ = ask(port, f"/?token={TOKEN}", Host="my-computer:8080")
    given = str(answer.headers["set-cookie"])
    assert answer.status == 303 and answer.headers["location"] == "/", "the address no longer has it"
    assert "HttpOnly" in given and "SameSite=strict" in given
    assert ask(port, "/api/now", Cookie=given.split(";")[0], Host="my-computer")[0].status == 200


def test_the_command_makes_a_token_beyond_loopback_and_ends_well(runs: Path, gpt2box: Command) -> None:
    command = [sys.executable, "-m", "gpt2box", "watch", "--port=0"]
    environment = {key: value for key, value in os.environ.items() if key != "GPT2BOX_WATCH_TOKEN"}
    addresses = []
    for more in (["--host=0.0.0.0"], ["--host=0.0.0.0", "--behind-loopback"]):
        server = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True, env=environment)
        assert server.stderr
        found = re.search(r"http://\S+:(\d+)/(?:\?token=(\S+))?", server.stderr.readline())
        assert found
        addresses.append(found)
        port, token = int(found[1]), found[2]
        assert ask(port, "/")[0].status == (401 if token else 200)
        taken = gpt2box("watch", f"--port={port}") if token else None
        server.send_signal(signal.SIGTERM if token else signal.SIGINT)
        said = server.communicate()[1]
        assert server.returncode == 0 and said == "", said
        if taken:
            assert taken.returncode == 2 and "next: --port" in taken.stderr
    assert len(addresses[0][2]) >= 32 and addresses[1][2] is None
    short = gpt2box("watch", "--token=short")
    assert short.returncode == 2 and "16 to 200" in short.stderr


@pytest.mark.skipif(not chromium(), reason="needs chromium and chromedriver")
def test_in_a_browser_the_page_lives_and_reads_on_a_phone_and_in_the_dark(
    runs: Path, serve: Any, tmp_path: Path
) -> None:
    folder = run_of(runs, "a", 50)
    (folder / "samples/step-00000050.txt").write_text("<b>To be</b>" + " or not to be" * 40)
    page = write_report(folder)
    port = serve()
    browser = Browser(tmp_path / "home")
    ask_now = "document.dispatchEvent(new Event('visibilitychange')); "
    try:
        browser.requests()
        browser.look(390, 800, dark=True)
        with locked(folder / ".lock", "it"):
            browser.open(f"http://127.0.0.1:{port}/")
            assert browser.until("return document.querySelectorAll('#plots canvas').length") == 5
            assert "<b>To be</b>" in browser.run("return document.getElementById('text').textContent")
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(line(51) + evaluated(51, 3.25))
            figures = browser.until(
                "return document.getElementById('figures').textContent", lambda text: "51 of" in text
            )
            assert "3.2500" in figures, "by itself"
        run_of(runs, "b", 2)
        browser.until(ask_now + "return document.getElementById('runs').textContent", lambda text: "b" in text)
        browser.run("location.hash = 'b'")
        browser.until("return document.title", lambda title: title.endswith("b"))
        shutil.rmtree(runs / "b")
        browser.until(ask_now + "return document.getElementById('state').textContent", lambda text: "not there" in text)
        browser.run("location.hash = 'a'")
        browser.until("return document.querySelectorAll('#plots canvas').length == 5 && !document.hidden")
        readable(browser)
        browser.look(1280, 800)
        readable(browser)
        browser.open(page.as_uri())
        browser.until("return document.querySelectorAll('#plots canvas').length == 5")
        readable(browser)
        assert browser.errors() == []
        asked = {address.split("/")[2] for address in browser.requests() if address.startswith("http")}
        assert asked == {f"127.0.0.1:{port}"}, "nothing from another host"
    finally:
        browser.close()


READABLE = """
const channel = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = (color) => {
  const [r, g, b] = color.match(/[0-9.]+/g).map((value) => channel(value / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const style = (element) => getComputedStyle(element);
const ground = light(style(document.body).backgroundColor);
const contrast = (element) => {
  const ink = light(style(element).color);
  return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
};
const texts = [...document.querySelectorAll("h1, h2, h3, dt, dd, td, th, p, pre, label, a")];
return {
  wide: document.documentElement.scrollWidth - innerWidth,
  small: Math.min(...texts.map((each) => parseFloat(style(each).fontSize))),
  pale: Math.min(...texts.map(contrast)),
};"""


def readable(browser: Browser) -> None:
    """Nothing sticks out to the side, and no text is small, or pale on its ground."""
    found = browser.run(READABLE)
    assert found["wide"] <= 0 and found["small"] >= 12 and found["pale"] >= 4.5, f"WCAG 2 asks for 4.5: {found}"
