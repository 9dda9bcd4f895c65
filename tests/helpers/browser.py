"""A real browser, Chromium, driven through its own driver (the WebDriver protocol) with what Python has."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALONE = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip


def chromium() -> tuple[str, str] | None:
    """The browser and its driver, where both are installed."""
    browser, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """A window. `errors` has what its console says, which is where a blocked request would be."""

    def __init__(self, home: Path, width: int = 1280, height: int = 1000) -> None:
        found = chromium()
        assert found
        command = [found[1], "--port=0"]
        self._driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._driver.stdout
        line = next(line for line in self._driver.stdout if "successfully on port" in line)
        self._address = f"http://127.0.0.1:{int(line.strip().rstrip('.').rpartition(' ')[2])}/session"
        arguments = [*ALONE, f"--user-data-dir={home}", f"--window-size={width},{height}"]
        wanted: dict[str, Any] = {
            "goog:chromeOptions": {"binary": found[0], "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._address += "/" + made["sessionId"]

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """At a screen of that size, as somebody who likes it so."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", **size)
        liked = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.cdp("Emulation.setEmulatedMedia", features=liked)

    def cdp(self, command: str, **parameters: object) -> Any:
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, address: str) -> None:
        self._ask("POST", "/url", {"url": address})

    def run(self, script: str) -> Any:
        """What a function's body returns, in the page."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def until(self, script: str, holds: Callable[[Any], bool] = bool, seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not holds(found := self.run(script)):
            assert time.monotonic() < end, f"{script}: {found!r}"
            time.sleep(0.1)
        return found

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        entries = [
            json.loads(entry["message"])["message"] for entry in self._ask("POST", "/se/log", {"type": "performance"})
        ]
        return [each["params"]["request"]["url"] for each in entries if each["method"] == "Network.requestWillBeSent"]

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def close(self) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.communicate()
