"""What a run keeps of how it began and what it ran on: config.yaml, plan.json, manifest.json."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt2box import config_file
from gpt2box.config import Config, may_change, validate
from gpt2box.data.tokens import Dataset
from gpt2box.errors import BadInput
from gpt2box.machine.provenance import provenance
from gpt2box.paths import write_atomically
from gpt2box.planning.plan import RunPlan
from gpt2box.progress import say


def check_unchanged(config: Config, dataset: Dataset, run: Path) -> None:
    """A run goes on with the settings and the text it began with, but for settings that do not change what is learned.

    Raises:
        BadInput: lists what differs.
    """
    began = read_manifest(run)
    if began and began["dataset"]["splits"] != dataset.manifest.get("splits"):
        raise BadInput(
            f"the dataset in {dataset.folder} is not the one that the run {config.name} began with",
            f"the same text: {began['dataset']['splits']}",
            f"prepare it as it was, or begin another run with --name {config.name}-2",
        )
    path = run / "config.yaml"
    if not path.exists():
        return
    before = validate(config_file.read_yaml(path), str(path))
    differing = [key for key in Config.model_fields if getattr(before, key) != getattr(config, key)]
    if refused := [key for key in differing if not may_change(key)]:
        lines = [f"{key}: {getattr(before, key)} before, {getattr(config, key)} now" for key in refused]
        raise BadInput(
            f"the run {config.name} began with other settings:\n    " + "\n    ".join(lines),
            "the same settings to go on",
            f"undo the change, or begin another run with --name {config.name}-2",
        )
    for key in differing:
        stretched = key == "max_steps" and config.decay_steps is None and config.lr_schedule != "constant"
        tail = "; the learning rate's schedule now ends there" if stretched else ""
        say(f"note: {key}: {getattr(before, key)} before, {getattr(config, key)} now{tail}")


def read_manifest(run: Path) -> dict[str, Any]:
    """manifest.json, or nothing where it is missing or unreadable."""
    try:
        content: dict[str, Any] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        return content if "splits" in content["dataset"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_records(run: Path, config: Config, plan: RunPlan, dataset: Dataset, device: str) -> None:
    """config.yaml, plan.json and manifest.json; the last keeps what each session ran on."""
    write_atomically(run / "config.yaml", config_file.to_yaml(config))
    write_atomically(run / "plan.json", json.dumps(asdict(plan), indent=2) + "\n")
    summary = {key: dataset.manifest.get(key) for key in ("source", "tokenizer", "splits")}
    session = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **provenance(device)}
    manifest = {
        "dataset": {"folder": str(dataset.folder), **summary},
        "sessions": [*read_manifest(run).get("sessions", []), session],
    }
    write_atomically(run / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
