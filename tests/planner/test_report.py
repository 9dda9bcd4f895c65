"""`gpt2box plan`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gpt2box.config import loader
from gpt2box.model.shape import ModelShape
from gpt2box.planner.execution_plan import ExecutionPlan
from gpt2box.planner.search import choose_execution_plan, list_execution_plans
from gpt2box.planner.target_device import TargetDevice
from tests.helpers.commands import Command
from tests.helpers.plans import shape_of


def chosen(device: TargetDevice, shape: ModelShape | None = None, **flags: str) -> ExecutionPlan:
    loaded = loader.load_config("openwebtext-adamw", flags)[0]
    shape = shape or shape_of("gpt2-medium")
    return choose_execution_plan(list_execution_plans(loaded, shape, device), loaded, shape, device)


def test_text_and_json_report_the_same_figures(gpt2box: Command, volumes: Path) -> None:
    text = gpt2box("plan", "shakespeare", "--gpu", "rtx-4070", "--explain")
    data = json.loads(gpt2box("plan", "shakespeare", "--gpu", "rtx-4070", "--json").stdout)
    assert text.returncode == 0 and "estimated" in text.stdout
    assert f"{data['chosen']['tokens_per_sec']:,.0f} tokens/s" in text.stdout and data["kind"] == "estimated"
    assert data["chosen"]["memory"]["total"] == sum(v for k, v in data["chosen"]["memory"].items() if k != "total")
    here = gpt2box("plan", "demo")
    assert here.returncode == 0 and "on this CPU" in here.stdout
    table = gpt2box("plan", "shakespeare", "--vram-gib", "12", "--all-sizes")
    assert table.returncode == 0 and "gpt2-xl" in table.stdout and "does not fit" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["shakespeare", "--gpu", "rtx-4071"], 2, "did you mean rtx-407"),
        (["shakespeare", "--vram-gib", "nan"], 2, "is not a number"),
        (["shakespeare", "--vram-gib", "3"], 3, "the least that these settings need"),
        (["shakespeare", "--gpu", "rtx-4070", "--micro-batch-size", "0"], 2, "expected [auto|N ≥ 1]"),
        (["nothing.yaml", "--gpu", "rtx-4070"], 2, "no file"),
        (["shakespeare"], 2, "--gpu rtx-4070"),
        (["finetune", "--gpu", "rtx-4070", "--block-size", "2048"], 2, "allow at most 1024"),
        (["finetune", "--gpu", "rtx-4070", "--compile=true", "--optimizer-in-backward=true"], 2, "compile: found true"),
        (["shakespeare", "--vram-gib", "1e300"], 2, "--vram-gib"),
    ],
)
def test_invalid_arguments_are_refused(
    gpt2box: Command, volumes: Path, arguments: list[str], code: int, part: str
) -> None:
    done = gpt2box("plan", *arguments)
    assert done.returncode == code and part in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_alternative_plans_are_listed_fastest_first_with_exact_memory(gpt2box: Command) -> None:
    done = gpt2box("plan", "finetune-xl", "--gpu", "rtx-4070")
    ways = [line for line in done.stdout.splitlines() if line.startswith(("  none ", "  selective ", "  full "))]
    paces = [float(way.split("GiB")[1].split()[0].replace(",", "")) for way in ways]
    assert len(ways) == 3 and paces == sorted(paces, reverse=True), ways
    assert "of 11.50 GiB free" in done.stdout and all(re.search(r"\d\.\d\d GiB", way) for way in ways)
    wrong = gpt2box("plan", "finetune", "--gpu", "nope")
    assert wrong.returncode == 2 and max(map(len, wrong.stderr.splitlines())) <= 120
