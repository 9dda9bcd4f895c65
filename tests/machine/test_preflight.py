"""Preflight on machines that a library in the driver's place describes, and on this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2box.preflight import checks, smoke_test
from gpt2box.system import gpu
from gpt2box.system.gpu import Nvml
from tests.helpers.commands import Command
from tests.helpers.nvml import Scene

CU121 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]  # torch 2.4.1's own list
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def asked() -> Any:
    """Return the result of gpu.query_nvml in a new process, which loads the simulated NVML."""
    code = (
        "import json, dataclasses as d; from gpt2box.system import gpu; print(json.dumps(d.asdict(gpu.query_nvml())))"
    )
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_a_card_with_its_memory_and_who_holds_it(scene: Scene) -> None:
    scene("one")
    nvml = asked()
    (card,) = nvml["gpus"]
    assert (nvml["driver"], nvml["cuda"], nvml["fault"]) == ("550.54.14", [12, 4], "")
    assert (card["name"], card["capability"], card["total_bytes"]) == ("NVIDIA GeForce RTX 4070", [8, 9], 12 << 30)
    assert [(p["name"], p["used_bytes"] >> 30) for p in card["processes"]] == [("process 4242", 2), ("Xorg", 1)]
    assert (card["temperature_c"], card["power_limit_w"], card["pcie_width"], card["is_mig"]) == (45, 200, 16, False)


def test_several_cards_and_the_ones_that_cuda_may_use(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene("two")
    assert [card["capability"] for card in asked()["gpus"]] == [[8, 9], [12, 0]]
    for selection, names in {"1": ["5090"], "GPU-5090": ["5090"], "1,0": ["5090", "4070"], "7,0": [], "": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", selection)
        assert [card["name"].split()[-1] for card in asked()["gpus"]] == names


def test_slices_have_their_own_memory_and_their_parents_capability(scene: Scene) -> None:
    scene("mig")
    cards = asked()["gpus"]
    assert [(c["total_bytes"] >> 30, c["capability"], c["is_mig"]) for c in cards] == [(20, [8, 0], True)] * 2


def test_a_card_of_which_nothing_is_told_is_still_a_card(scene: Scene) -> None:
    scene("mute")
    (card,) = asked()["gpus"]
    assert card["name"] == "unknown card" and card["total_bytes"] is None and card["temperature_c"] is None


def test_no_driver_and_broken_drivers_are_told_apart(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene("mismatch")
    assert "reboot" in asked()["fault"]
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert asked()["fault"]
    subprocess.run(["gcc", "-shared", "-x", "c", "-", "-o", tmp_path / "libnvidia-ml.so.1"], input=b"", check=True)
    assert "does not answer" in asked()["fault"]  # a library without NVML's functions


@pytest.mark.parametrize(
    ("capability", "built_for", "status", "fix"),
    [
        ((8, 9), CU121, "ok", ""),  # sm_86 runs on 8.9
        ((12, 0), CU121, "failure", "STACK=cu13x"),
        ((10, 0), CU121, "failure", "STACK=cu13x"),
        ((12, 0), CU130, "ok", ""),
        ((12, 1), CU130, "ok", ""),
        ((6, 1), CU130, "failure", "STACK=cu121"),
        ((3, 5), CU121, "failure", "--device cpu"),
    ],
)
def test_a_card_against_the_wheels_architectures(
    capability: tuple[int, int], built_for: list[str], status: str, fix: str
) -> None:
    finding = checks.architecture(capability, built_for, "12.1" if built_for is CU121 else "13.0")
    assert finding.status == status and fix in finding.fix


def test_driver_against_cuda() -> None:
    old = Nvml("470.256.02", (11, 4), [])
    assert checks.driver(old, "12.1", True, False).status == "failure"
    assert "525.60.13" in checks.driver(old, "12.1", True, False).fix
    usual = Nvml("550.54.14", (12, 4), [])
    assert checks.driver(usual, "12.1", True, False).status == "ok"
    assert "STACK=cu121" in checks.driver(usual, "13.0", True, False).fix
    blackwell = [gpu.Gpu(0, "RTX 5070", "", (12, 0), None, None, (), None, None, None, None, None, None, None, None)]
    assert "cu121" not in checks.driver(Nvml("570.1", (12, 8), blackwell), "13.0", True, False).fix
    missing = Nvml(fault="no NVIDIA driver: libnvidia-ml.so.1 is not here")
    assert "--gpus all" in checks.driver(missing, "12.1", True, False).fix
    assert "Windows" in checks.driver(missing, "12.1", False, True).fix


def findings(output: str) -> dict[str, dict[str, str]]:
    return {finding["name"]: finding for finding in json.loads(output)["findings"]}


def test_preflight_with_a_card_that_pytorch_cannot_reach(scene: Scene, started: Command) -> None:
    """The driver's stand-in lists a card, and PyTorch, which has no driver, cannot use it: found, not crashed."""
    scene("one")
    done = started("preflight", "--json")
    found = findings(done.stdout)
    assert done.returncode == 3 and json.loads(done.stdout)["ok"] is False
    too_old = (torch.version.cuda or "").startswith("13")  # the stand-in's driver runs CUDA up to 12.4
    assert found["driver"]["status"] == ("failure" if too_old else "ok") and found["card"]["status"] == "ok"
    assert found["vram"]["status"] == "warning" and "Xorg 1.0 GiB" in found["vram"]["found"]
    assert found["pytorch"]["status"] == "failure" and found["pytorch"]["fix"]


def test_preflight_names_every_fault_of_an_old_machine(scene: Scene, started: Command) -> None:
    scene("old")
    done = started("preflight", "--json", "--device", "cuda:0")
    found = findings(done.stdout)
    assert done.returncode == 3
    assert {found[name]["status"] for name in ("temperature", "power", "pcie")} == {"warning"}
    assert "nvidia-smi -pl 200" in found["power"]["fix"]


def test_preflight_without_a_card(scene: Scene, started: Command) -> None:
    scene("none")
    done = started("preflight", "--device", "cuda:1")
    assert done.returncode == 3 and "no card with the number 1" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "wrong", [["--device", "tpu"], ["--n-layer", "abc"], ["--lora-rank", "-5"], ["demo", "--device", "tpu"]]
)
def test_preflight_looks_at_the_options_first(started: Command, wrong: list[str]) -> None:
    done = started("preflight", *wrong)
    assert done.returncode == 2 and wrong[-2].strip("-").replace("-", "_") in done.stderr, done.stderr


def test_preflight_misses_a_dataset_that_is_asked_for(started: Command) -> None:
    done = started("preflight", "--dataset", "nope", "--device", "cpu")
    assert done.returncode == 3 and "no dataset nope" in done.stdout


def test_a_card_before_bfloat16_need_not_compute_it_unless_it_is_asked_to() -> None:
    fault: dict[str, Any] = {"bf16_fault": "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED"}
    usual, asked_for = (checks.bfloat16(fault, (6, 1), True, wanted) for wanted in (False, True))
    assert usual.status == "warning" and "float32" in usual.fix and asked_for.status == "failure"
    assert checks.bfloat16(fault, (8, 9), True, False).status == "failure"


def test_a_probe_that_does_not_die_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke_test, "TIMEOUT_S", 0.2)
    begun = time.monotonic()
    assert "did not answer" in smoke_test.probe("cpu", False)["fault"] and time.monotonic() - begun < 5


@pytest.mark.parametrize(("in_container", "fix"), [(True, "--gpus all"), (False, "nvidia-smi")])
def test_where_a_card_is_missed(in_container: bool, fix: str) -> None:
    assert fix in checks.card(Nvml("550", (12, 4), []), 0, in_container).fix


def test_preflight_for_the_cpu_tries_things(started: Command, volumes: Path) -> None:
    done = started("preflight", "demo", "--device", "cpu", "--json")
    found = findings(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "a product was computed" in found["bfloat16"]["found"]
    assert "vocabulary" not in found, "it is of characters"
    assert found["disk"]["status"] == "ok"
    assert "checkpoints" in found["disk"]["found"] and found["write: runs"]["found"] == str(volumes / "runs")


def test_preflight_says_that_the_hub_is_needed_and_does_not_answer(
    started: Command, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = started("preflight", "finetune", "--device", "cpu")
    assert done.returncode == 3 and "http://127.0.0.1:9 does not answer" in done.stdout
    assert "weights of gpt2-medium" in done.stdout


def test_training_stops_at_the_card_before_any_work(
    scene: Scene, started: Command, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that is listed but not usable is never silently replaced by the CPU, but by a PyTorch for the CPU."""
    scene("old")
    done = started("train", "demo", "--dataset", "text", "--device", "cuda")
    assert done.returncode == 3 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    done = started("train", "demo", "--dataset", "text", "--device", "auto", "--max-steps", "0", "--eval-only")
    assert done.returncode == (3 if torch.version.cuda else 0), done.stderr
    monkeypatch.delenv("LD_LIBRARY_PATH")
    done = started("train", "shakespeare")
    assert done.returncode == 3 and "driver" in done.stderr and "--device cpu" in done.stderr
    assert not list((volumes / "runs").glob("*"))


def test_card_numbers_follow_the_pci_bus() -> None:
    code = "import os, gpt2box.inference.model_loader; print(os.environ['CUDA_DEVICE_ORDER'])"
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_DEVICE_ORDER"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "PCI_BUS_ID\n"


def test_preflight_with_a_broken_pytorch(started: Command, volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = volumes / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    done = started("preflight", "demo", "--json")
    assert done.returncode == 3 and "libcudart.so.12" in findings(done.stdout)["pytorch"]["found"]
    assert findings(done.stdout)["disk"]["status"] == "ok"


def test_plan_for_the_card_that_is_here_counts_what_is_free_now(started: Command, volumes: Path, scene: Scene) -> None:
    scene("one")
    done = started("plan", "shakespeare")
    assert done.returncode == 0 and "9.0 GiB of 12.0 GiB free now" in done.stdout and "tokens/s" in done.stdout
