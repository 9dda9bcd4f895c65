"""The dashboard's server: access, headers, and the page in a real browser."""

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
from gpt2box.report.page import write_report
from gpt2box.utils.files import file_lock
from tests.helpers.browser import Browser, chromium
from tests.helpers.commands import Command
from tests.helpers.run_folders import eval_line, make_run_folder, train_line

TOKEN = "a-token_of_the-test0"


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


def test_the_page_is_read_only_local_and_loads_only_its_own_files(runs: Path, serve: Any) -> None:
    make_run_folder(runs, "a", 2)
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


def test_a_token_is_required_and_exchanged_for_a_cookie(runs: Path, serve: Any) -> None:
    port = serve(TOKEN)
    cookie = f"gpt2box-{port}"
    for path in ("/", "/api/now", "/page.js", "/?token=", "/?token=a-token_of_the-test1"):
        assert ask(port, path, Cookie=f"{cookie}=wrong")[0].status == 401
    answer, _ = ask(port, f"/?token={TOKEN}", Host="my-computer:8080")
    given = str(answer.headers["set-cookie"])
    assert answer.status == 303 and answer.headers["location"] == "/", "the address no longer has it"
    assert "HttpOnly" in given and "SameSite=strict" in given
    assert ask(port, "/api/now", Cookie=given.split(";")[0], Host="my-computer")[0].status == 200


def test_watch_creates_a_token_beyond_loopback_and_exits_cleanly(runs: Path, gpt2box: Command) -> None:
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
def test_a_browser_shows_live_updates_readably_on_a_phone_and_in_dark_mode(
    runs: Path, serve: Any, tmp_path: Path
) -> None:
    folder = make_run_folder(runs, "a", 50)
    (folder / "samples/step-00000050.txt").write_text("<b>To be</b>" + " or not to be" * 40)
    page = write_report(folder)
    port = serve()
    browser = Browser(tmp_path / "home")
    ask_now = "document.dispatchEvent(new Event('visibilitychange')); "
    try:
        browser.requests()
        browser.look(390, 800, dark=True)
        with file_lock(folder / ".lock", "it"):
            browser.open(f"http://127.0.0.1:{port}/")
            assert browser.until("return document.querySelectorAll('#plots canvas').length") == 5
            assert "<b>To be</b>" in browser.run("return document.getElementById('text').textContent")
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(train_line(51) + eval_line(51, 3.25))
            figures = browser.until(
                "return document.getElementById('figures').textContent", lambda text: "51 of" in text
            )
            assert "3.2500" in figures, "by itself"
        make_run_folder(runs, "b", 2)
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
