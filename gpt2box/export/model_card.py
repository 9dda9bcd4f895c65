"""Write the model card of an exported model: its size, training and use."""

import json
import re
from pathlib import Path
from typing import Any

from gpt2box.config.loader import read_yaml
from gpt2box.config.schema import MODEL_SHAPES
from gpt2box.data import hub_models
from gpt2box.model.shape import ModelShape
from gpt2box.utils.files import read_json_object
from gpt2box.utils.progress import format_duration

# The folders of an absolute path: useless to readers of the card, and they may reveal a user name.
LEADING_FOLDERS = re.compile(r"(?<![\w:/.])(?:/[^/,|]+)+/")
SETTINGS = ("init_from", "learning_rate", "lr_schedule", "tokens_per_step", "dropout", "weight_decay", "seed")


def model_card(folder: Path, shape: ModelShape, license_id: str, title: str, folder_name: str) -> str:
    """Return the README.md of the model in `folder`, with the records of its run if it is a checkpoint.

    `title` is the name on the Hub, or "". `folder_name` is the export's folder, which the usage example names.
    """
    run = folder.resolve().parent.parent
    manifest, state = read_json_object(run / "manifest.json"), read_json_object(folder / "state.json")
    settings = read_yaml(run / "config.yaml") if manifest and (run / "config.yaml").exists() else {}
    name = title or (run.name if manifest else folder.resolve().name)
    lines = ["---", *front_matter(settings, license_id), "---", "", f"# {name}", ""]
    lines += [
        f"A GPT-2 of {shape.parameters:,} parameters, by gpt2box: {shape.n_layer} layers of {shape.n_head} heads,"
        f" {shape.n_embd} wide, a context of {shape.block_size:,} tokens, a vocabulary of {shape.vocab_size:,}.",
        "",
    ]
    if manifest:
        lines += training_section(manifest, state, settings)
    lines += [
        "## Use",
        "",
        "```python",
        "from transformers import pipeline",
        f'write = pipeline("text-generation", model="{title or folder_name}")',
        'print(write("It was", max_new_tokens=100)[0]["generated_text"])',
        "```",
        "",
        "It continues text in the style of its training text. What it writes may be false, biased or copied"
        " from its training text; it is not fit for advice or for decisions about people.",
    ]
    return "\n".join(lines) + "\n"


def front_matter(settings: dict[str, Any], license_id: str) -> list[str]:
    """Return the YAML front matter that the Hub reads."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2", "- gpt2box"]
    if license_id:
        lines.insert(0, f"license: {json.dumps(license_id)}")
    if base := base_model(str(settings.get("init_from", ""))):
        lines.append(f"base_model: {base}")
    return lines


def base_model(init_from: str) -> str:
    """Return the Hub name of the model that training started from, or "" if it is not from the Hub."""
    if init_from in MODEL_SHAPES:
        return f"openai-community/{init_from}"
    matched = hub_models.HUB_NAME.fullmatch(init_from)
    return matched.group(1) if matched and not Path(init_from).is_dir() else ""


def training_section(manifest: dict[str, Any], state: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Return the section on dataset, settings, losses and machine."""
    dataset, session = manifest.get("dataset", {}), (manifest.get("sessions") or [{}])[-1]
    splits = dataset.get("splits") or {}
    source = LEADING_FOLDERS.sub("", str(dataset.get("source") or dataset.get("folder") or "not recorded"))
    lines = ["## Training", "", "| | |", "|---|---|", f"| text | {source.replace('|', '/')} |"]
    for split, record in splits.items():
        lines.append(f"| {split} | {record['tokens']:,} tokens, sha256 {record['sha256'][:16]}… |")
    lines += [f"| {key} | {settings[key]} |" for key in SETTINGS if settings.get(key) is not None]
    lines.append(f"| steps | {state.get('step', 0):,}, {format_duration(state.get('seconds', 0.0))} |")
    if state.get("val_loss") is not None:
        lines.append(f"| val_loss | {state['val_loss']:.4f} nats per token |")
    lines += [f"| {key} | {session[key]} |" for key in ("device", "gpt2box", "torch") if session.get(key)]
    return [*lines, ""]
