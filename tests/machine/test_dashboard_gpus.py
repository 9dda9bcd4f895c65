"""The dashboard shows what the driver reports of each GPU; a stand-in library takes the driver's place."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.helpers.nvml import Scene

CODE = (
    "import json; from gpt2box.dashboard.state import DashboardState; print(json.dumps(DashboardState().read_gpus()))"
)


def query_gpus() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_gpu_memory_is_shown_by_process(scene: Scene) -> None:
    scene("two")
    first, second = query_gpus()["cards"]
    assert (first["name"], second["name"]) == ("NVIDIA GeForce RTX 4070", "NVIDIA GeForce RTX 5090")
    assert dict(first["figures"])["memory"] == "3.0 of 12.0 GiB" and first["used"] == 0.25
    assert ["Xorg", "1111", "1.0 GiB"] in first["processes"]


def test_figures_missing_from_the_driver_are_left_out(scene: Scene) -> None:
    scene("mute")
    (card,) = query_gpus()["cards"]
    assert card["used"] == 0 and "memory" not in dict(card["figures"])
    scene("mismatch")
    found = query_gpus()
    assert found["cards"] == [] and "reboot" in found["fault"]
