"""The model card of an exported model: what it is, from what it was made, and how to use it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gpt2box.config.loader import read_yaml
from gpt2box.config.schema import MODEL_SHAPES
from gpt2box.data import hub_models
from gpt2box.model.shape import ModelShape
from gpt2box.utils.files import read_object
from gpt2box.utils.progress import duration

# Of a path from the root: whoever reads the card has no use for them, and they may tell a name.
LEADING_FOLDERS = re.compile(r"(?<![\w:/.])(?:/[^/,|]+)+/")
SETTINGS = ("init_from", "learning_rate", "lr_schedule", "tokens_per_step", "dropout", "weight_decay", "seed")


def model_card(folder: Path, shape: ModelShape, licence: str, title: str, place: str) -> str:
    """README.md of the model in `folder`, from the records of its run where it is a run's checkpoint.

    `title`: what it is called on the Hub, if it goes there. `place`: the folder that it is written to.
    """
    run = folder.resolve().parent.parent
    manifest, state = read_object(run / "manifest.json"), read_object(folder / "state.json")
    settings = read_yaml(run / "config.yaml") if manifest and (run / "config.yaml").exists() else {}
    name = title or (run.name if manifest else folder.resolve().name)
    lines = ["---", *front_matter(settings, licence), "---", "", f"# {name}", ""]
    lines += [
        f"A GPT-2 of {shape.parameters:,} parameters, by gpt2box: {shape.n_layer} layers of {shape.n_head} heads,"
        f" {shape.n_embd} wide, a context of {shape.block_size:,} tokens, a vocabulary of {shape.vocab_size:,}.",
        "",
    ]
    if manifest:
        lines += of_training(manifest, state, settings)
    lines += [
        "## Use",
        "",
        "```python",
        "from transformers import pipeline",
        f'write = pipeline("text-generation", model="{title or place}")',
        'print(write("It was", max_new_tokens=100)[0]["generated_text"])',
        "```",
        "",
        "It goes on with text in the manner of what it was trained on. What it says may be false, biased or copied"
        " from its training text; it is not fit for advice or for decisions about people.",
    ]
    return "\n".join(lines) + "\n"


def front_matter(settings: dict[str, Any], licence: str) -> list[str]:
    """What the Hub reads."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2", "- gpt2box"]
    if licence:
        lines.insert(0, f"license: {json.dumps(licence)}")
    if base := base_model(str(settings.get("init_from", ""))):
        lines.append(f"base_model: {base}")
    return lines


def base_model(init_from: str) -> str:
    """By its name on the Hub, where it is from there."""
    if init_from in MODEL_SHAPES:
        return f"openai-community/{init_from}"
    matched = hub_models.NAME.fullmatch(init_from)
    return matched.group(1) if matched and not Path(init_from).is_dir() else ""


def of_training(manifest: dict[str, Any], state: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Data, settings, losses and machine."""
    data, session = manifest.get("dataset", {}), (manifest.get("sessions") or [{}])[-1]
    splits = data.get("splits") or {}
    source = LEADING_FOLDERS.sub("", str(data.get("source") or data.get("folder") or "not recorded"))
    lines = ["## Training", "", "| | |", "|---|---|", f"| text | {source.replace('|', '/')} |"]
    for split, about in splits.items():
        lines.append(f"| {split} | {about['tokens']:,} tokens, sha256 {about['sha256'][:16]}… |")
    lines += [f"| {key} | {settings[key]} |" for key in SETTINGS if settings.get(key) is not None]
    lines.append(f"| steps | {state.get('step', 0):,}, {duration(state.get('seconds', 0.0))} |")
    if state.get("val_loss") is not None:
        lines.append(f"| val_loss | {state['val_loss']:.4f} nats a token |")
    lines += [f"| {key} | {session[key]} |" for key in ("device", "gpt2box", "torch") if session.get(key)]
    return [*lines, ""]
