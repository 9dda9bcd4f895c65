"""Repeat a run from its manifest.json alone (`gpt2box reproduce`)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2box.config.schema import Config
from gpt2box.config.validation import validate
from gpt2box.data.dataset import SPLITS, open_dataset
from gpt2box.data.hub_models import HUB_NAME as HUB_NAME
from gpt2box.data.prepare import prepare
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.pretrained import pretrained_folder
from gpt2box.errors import BadInput, describe_error
from gpt2box.preflight.requirements import has_dataset, known_corpus_name, select_tokenizer
from gpt2box.runs.manifest import describe_dataset, describe_weights, is_same_dataset
from gpt2box.runs.sessions import (
    CHANGEABLE_SETTINGS,
    changeable_execution,
    execution_changes_after,
    session_at_step,
    session_differences,
    valid_sessions,
)
from gpt2box.system.determinism import enable_determinism
from gpt2box.system.device import choose_device
from gpt2box.system.provenance import collect_provenance
from gpt2box.training.run import run_config
from gpt2box.utils.files import read_json
from gpt2box.utils.paths import dataset_dir, display_path, run_dir, validate_name
from gpt2box.utils.progress import log_line
from gpt2box.utils.signals import StopRequest, exit_on_signal

MAX_MANIFEST_BYTES = 100_000_000
NAME_SUFFIX = "-reproduced"
MAX_SHOWN_FILES = 5


def reproduce(path: Path, name: str | None, device: str | None, stop: StopRequest) -> None:
    """Repeat the run that a manifest.json describes, under another name; the same command resumes it.

    Raises:
        BadInput: The manifest is invalid, or an input is missing or differs from the original.
        Gpt2boxError: Training fails.
    """
    manifest = read_complete_manifest(path)
    config = load_settings(manifest, path, name, device)
    ensure_dataset(config, manifest["dataset"])
    check_weights(config, manifest)
    log_differences(config, manifest)
    run_config(config, display_path(run_dir(config.name) / "config.yaml"), stop)


def read_complete_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest that has settings, dataset and sessions. Raises BadInput: the file is not such a manifest."""
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        manifest = read_json(path)
        sessions = valid_sessions(manifest)
        has_inputs = isinstance(manifest["settings"], dict) and isinstance(manifest["dataset"]["splits"], dict)
        if not has_inputs or not sessions:
            raise ValueError("no settings, dataset or sessions")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path} is no manifest to reproduce a run from ({describe_error(error)})",
            "manifest.json in a run's folder, written by this version",
            "gpt2box reproduce volumes/runs/NAME/manifest.json",
        ) from error
    return dict(manifest)


def load_settings(manifest: dict[str, Any], path: Path, name: str | None, device: str | None) -> Config:
    """Return the run's settings, with the micro-batch size and activation checkpointing that were chosen then.

    Both determine the order in which gradients are summed, so the bits depend on them.

    Raises BadInput: a setting is invalid.
    """
    values = {**manifest["settings"], "wandb": "off"}  # the person who reproduces a run did not ask to send data
    sessions = valid_sessions(manifest)
    execution = session_at_step(sessions, 0)["way"]
    values |= {key: execution[key] for key in ("micro_batch_size", "activation_checkpointing") if key in execution}
    if device:
        values["device"] = device
    config = validate(values, str(path))
    name = validate_name(name or f"{config.name}{NAME_SUFFIX}", "run")
    for session in sessions[1:]:
        for key in sorted(CHANGEABLE_SETTINGS & session["changed"].keys()):
            log_line(
                f"note: the run changed {key} at step {session['step']:,}; this one uses the last value from the start"
            )
    for step, later in execution_changes_after(sessions, 0).items():
        changes = ", ".join(f"{key} {value}" for key, value in changeable_execution(later).items())
        log_line(
            f"note: the run went on from step {step:,} with {changes}; this one does not: from there on the bits differ"
        )
    return config.model_copy(update={"name": name})


def ensure_dataset(config: Config, original: dict[str, Any]) -> None:
    """Prepare the dataset if it is missing, and check that it has the original's tokens.

    Raises BadInput: the dataset differs, or its source text is missing.
    """
    if not has_dataset(config):
        if "/" in config.dataset:  # never write to a folder that a foreign file names
            raise BadInput(
                f"no dataset in {config.dataset}",
                "the run's own dataset there",
                f"gpt2box prepare ITS_TEXT --name {Path(config.dataset).name}, and --dataset's value in the manifest",
            )
        corpus = known_corpus_name(config.dataset)
        sources = [corpus] if corpus else find_source_files(config.dataset, original)
        options = replace(prepare_options(original), tokenizer=requested_tokenizer(config, original))
        with exit_on_signal():
            prepare(sources, options, folder=dataset_dir(config.dataset))
    dataset = open_dataset(dataset_dir(config.dataset))
    actual = describe_dataset(dataset, {})
    if not is_same_dataset(original["splits"], actual["splits"]):
        lines = [
            f"{split}: {original['splits'].get(split)} then, {actual['splits'].get(split)} now"
            for split in SPLITS
            if original["splits"].get(split) != actual["splits"].get(split)
        ]
        raise BadInput(
            f"the dataset in {dataset.folder} is not the run's:\n    " + "\n    ".join(lines),
            f"the one made from {original.get('source')} by {original.get('written_by')}",
            "move that folder away, and put the run's own or its text there",
        )


def find_source_files(name: str, original: dict[str, Any]) -> list[str]:
    """Return the text files that the dataset was prepared from.

    Raises BadInput: some are missing; the message lists them.
    """
    paths = str(original.get("source", "")).split(", ")
    if all(path and Path(path).is_file() for path in paths):
        return paths
    files = original.get("documents")
    listed = files[:MAX_SHOWN_FILES] if isinstance(files, list) else []
    lines = [f"{file.get('name')}, sha256 {file.get('sha256')}" for file in listed if isinstance(file, dict)]
    more = (
        [f"and {len(files) - MAX_SHOWN_FILES} more"] if isinstance(files, list) and len(files) > MAX_SHOWN_FILES else []
    )
    raise BadInput(
        f"the dataset {name} is not here, nor what it was made from ({original.get('source')}):\n    "
        + "\n    ".join([*lines, *more]),
        f"these files, or the dataset's folder as {dataset_dir(name)}",
        f"gpt2box prepare THEM --name {Path(name).name}, then the same command again",
    )


def prepare_options(original: dict[str, Any]) -> PrepareConfig:
    """Return the options that `prepare` got for the original dataset.

    Raises BadInput: an option in the manifest has the wrong type.
    """
    sections = [section for key in ("split", "choices") if isinstance(section := original.get(key), dict)]
    recorded = {key: value for section in sections for key, value in section.items()}
    options = {
        key: recorded[key] for key in ("val_fraction", "text_column", "max_docs", "keep_duplicates") if key in recorded
    }
    if isinstance(recorded.get("split"), str):
        options["split"] = recorded["split"]
    types = {"val_fraction": float, "text_column": str, "max_docs": int, "keep_duplicates": bool, "split": str}
    if wrong := [key for key, value in options.items() if value is not None and type(value) is not types[key]]:
        raise BadInput(f"the manifest's dataset has {wrong[0]} {options[wrong[0]]!r}", "as `prepare` writes it")
    return PrepareConfig(**options)


def requested_tokenizer(config: Config, original: dict[str, Any]) -> str:
    """Return the value of prepare's --tokenizer: char, gpt2, or the model that the run started from.

    Raises BadInput: the dataset used another model's tokenizer, of which the manifest has no copy.
    """
    if original.get("requested_tokenizer") == "char":
        return "char"
    tokenizer = original.get("tokenizer")
    if not isinstance(tokenizer, dict) or tokenizer.get("kind") == "gpt2":
        return "gpt2"
    if (initial := select_tokenizer(config)) != "gpt2":
        return initial
    raise BadInput(
        f"the dataset {config.dataset} is not here, and was in the tokens of a model that the run did not begin from",
        f"a vocabulary of {tokenizer.get('vocab_size')} tokens",
        f"gpt2box prepare TEXT --tokenizer FOLDER --name {Path(config.dataset).name}, then the same command again",
    )


def check_weights(config: Config, manifest: dict[str, Any]) -> None:
    """Fetch the initial weights if needed, and compare their checksums with the original's.

    Raises BadInput: the weights differ.
    """
    original = manifest.get("weights")
    if config.init_from == "scratch" or not isinstance(original, dict) or not original.get("sha256"):
        return
    repo, commit = original.get("repo"), original.get("commit")
    is_from_hub = repo and commit and HUB_NAME.fullmatch(config.init_from)
    folder = pretrained_folder(f"{repo}@{commit}" if is_from_hub else config.init_from)
    actual = describe_weights(config.init_from, folder)["sha256"]
    if actual != original["sha256"]:
        raise BadInput(f"the weights in {folder} are {actual}", f"those that the run began from: {original['sha256']}")


def log_differences(config: Config, manifest: dict[str, Any]) -> None:
    """Log how this machine and program differ from the run's first session, and which differences may change bits."""
    first_session = {key: value for key, value in valid_sessions(manifest)[0].items() if key != "way"}
    device = choose_device(config.device)
    if config.deterministic is True:
        enable_determinism(compiled=False)  # sets an environment variable that is part of the comparison
    now = {**collect_provenance(device), "device_type": device.type}
    bit_relevant = session_differences(first_session, now, bits_only=True)
    for line in session_differences(first_session, now):
        log_line(f"note: {line}" + (": the bits may differ" if line in bit_relevant else ""))
