"""Read a run's plan.json, whichever version of gpt2box wrote it."""

from pathlib import Path
from typing import Any

from gpt2box.utils.files import read_json_object

SECTIONS = ("config", "execution", "derived")  # later sections override: config may say "auto" where execution has 4


def read_plan(run: Path) -> dict[str, Any]:
    """Read plan.json as one flat mapping; empty if the file is missing or damaged. Values are not checked."""
    return flatten_plan(read_json_object(run / "plan.json"))


def flatten_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """Merge the sections of a plan into one mapping. A plan without sections, of an older version, stays as it is."""
    sections = {name: plan[name] for name in SECTIONS if isinstance(plan.get(name), dict)}
    flat = {key: value for key, value in plan.items() if key not in sections}
    return {**sections.pop("config", {}), **flat, **sections.get("execution", {}), **sections.get("derived", {})}
