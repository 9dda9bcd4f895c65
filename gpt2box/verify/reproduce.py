"""`gpt2box reproduce`: the same run once more, from nothing but its manifest.json."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2box.config.schema import Config, validate
from gpt2box.data.dataset import SPLITS, open_dataset
from gpt2box.data.hub_models import NAME as HUB_NAME
from gpt2box.data.prepare import Options, prepare
from gpt2box.data.pretrained import pretrained_folder
from gpt2box.errors import BadInput, why
from gpt2box.preflight.requirements import corpus_of, has_dataset, words_for
from gpt2box.runs.manifest import describe_dataset, describe_weights, is_same_dataset
from gpt2box.runs.sessions import (
    CHANGEABLE_SETTINGS,
    changeable_execution,
    execution_changes_after,
    session_at_step,
    session_differences,
    valid_sessions,
)
from gpt2box.system.determinism import make_deterministic
from gpt2box.system.device import choose_device
from gpt2box.system.provenance import provenance
from gpt2box.training.run import run_config
from gpt2box.utils.files import read_json
from gpt2box.utils.paths import checked_name, dataset_dir, run_dir, shown
from gpt2box.utils.progress import say
from gpt2box.utils.signals import StopRequest, raised

LARGEST = 100_000_000  # bytes of a manifest.json
SUFFIX = "-reproduced"
SHOWN_FILES = 5


def reproduce(path: Path, name: str | None, device: str | None, stop: StopRequest) -> None:
    """Start the run that a manifest.json is of, under another name; the same command again goes on with it.

    Raises:
        BadInput: no such manifest, an input is missing, or is not what it was.
        Gpt2boxError: what training raises.
    """
    manifest = read(path)
    config = settings_in(manifest, path, name, device)
    bring_dataset(config, manifest["dataset"])
    check_weights(config, manifest)
    say_what_differs(config, manifest)
    goes_on = shown(run_dir(config.name) / "config.yaml")
    run_config(config, goes_on, stop)


def read(path: Path) -> dict[str, Any]:
    """A manifest that says all.

    Raises:
        BadInput: it does not.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        manifest = read_json(path)
        sessions = valid_sessions(manifest)
        whole = isinstance(manifest["settings"], dict) and isinstance(manifest["dataset"]["splits"], dict) and sessions
        if not whole:
            raise ValueError("no settings, dataset or sessions")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path} is no manifest to reproduce a run from ({why(error)})",
            "manifest.json in a run's folder, written by this version",
            "gpt2box reproduce volumes/runs/NAME/manifest.json",
        ) from error
    return dict(manifest)


def settings_in(manifest: dict[str, Any], path: Path, name: str | None, device: str | None) -> Config:
    """The settings, with the micro-batch and recompute that were chosen, by which the order of sums is the same.

    Raises:
        BadInput: what is wrong with them.
    """
    values = {**manifest["settings"], "wandb": "off"}  # who runs it again did not ask to send anything
    sessions = valid_sessions(manifest)
    way = session_at_step(sessions, 0)["way"]
    values |= {key: way[key] for key in ("micro_batch_size", "activation_checkpointing") if key in way}
    if device:
        values["device"] = device
    config = validate(values, str(path))
    name = checked_name(name or f"{config.name}{SUFFIX}", "run")
    for session in sessions[1:]:
        for key in sorted(CHANGEABLE_SETTINGS & session["changed"].keys()):
            say(f"note: the run changed {key} at step {session['step']:,}; this one has the last value all along")
    for step, later in execution_changes_after(sessions, 0).items():
        words = ", ".join(f"{key} {value}" for key, value in changeable_execution(later).items())
        say(f"note: the run went on from step {step:,} with {words}; this one does not: from there on the bits differ")
    return config.model_copy(update={"name": name})


def bring_dataset(config: Config, wanted: dict[str, Any]) -> None:
    """Have the dataset, from what is there or what it can be made from, and compare.

    Raises:
        BadInput: it is another, or what it was made from is missing.
    """
    if not has_dataset(config):
        if "/" in config.dataset:  # a folder that someone else's file names is not written
            raise BadInput(
                f"no dataset in {config.dataset}",
                "the run's own dataset there",
                f"gpt2box prepare ITS_TEXT --name {Path(config.dataset).name}, and --dataset's value in the manifest",
            )
        corpus = corpus_of(config.dataset)
        given = [corpus] if corpus else own_files(config.dataset, wanted)
        asked = replace(options_in(wanted), tokenizer=tokenizer_in(config, wanted))
        with raised():
            prepare(given, asked, folder=dataset_dir(config.dataset))
    dataset = open_dataset(dataset_dir(config.dataset))
    found = describe_dataset(dataset, {})
    if not is_same_dataset(wanted["splits"], found["splits"]):
        lines = [
            f"{split}: {wanted['splits'].get(split)} then, {found['splits'].get(split)} now"
            for split in SPLITS
            if wanted["splits"].get(split) != found["splits"].get(split)
        ]
        raise BadInput(
            f"the dataset in {dataset.folder} is not the run's:\n    " + "\n    ".join(lines),
            f"the one made from {wanted.get('source')} by {wanted.get('written_by')}",
            "move that folder away, and put the run's own or its text there",
        )


def own_files(name: str, wanted: dict[str, Any]) -> list[str]:
    """The texts of a dataset, where they lie as they lay then.

    Raises:
        BadInput: they do not; which.
    """
    paths = str(wanted.get("source", "")).split(", ")
    if all(path and Path(path).is_file() for path in paths):
        return paths
    files = wanted.get("documents")
    listed = files[:SHOWN_FILES] if isinstance(files, list) else []
    lines = [f"{each.get('name')}, sha256 {each.get('sha256')}" for each in listed if isinstance(each, dict)]
    more = [f"and {len(files) - SHOWN_FILES} more"] if isinstance(files, list) and len(files) > SHOWN_FILES else []
    raise BadInput(
        f"the dataset {name} is not here, nor what it was made from ({wanted.get('source')}):\n    "
        + "\n    ".join([*lines, *more]),
        f"these files, or the dataset's folder as {dataset_dir(name)}",
        f"gpt2box prepare THEM --name {Path(name).name}, then the same command again",
    )


def options_in(wanted: dict[str, Any]) -> Options:
    """What was asked for when the dataset was made.

    Raises:
        BadInput: the manifest does not say it rightly.
    """
    parts = [part for key in ("split", "choices") if isinstance(part := wanted.get(key), dict)]
    asked = {key: value for part in parts for key, value in part.items()}
    known = {key: asked[key] for key in ("val_fraction", "text_column", "max_docs", "keep_duplicates") if key in asked}
    if isinstance(asked.get("split"), str):
        known["split"] = asked["split"]
    kinds = {"val_fraction": float, "text_column": str, "max_docs": int, "keep_duplicates": bool, "split": str}
    if wrong := [key for key, value in known.items() if value is not None and type(value) is not kinds[key]]:
        raise BadInput(f"the manifest's dataset has {wrong[0]} {known[wrong[0]]!r}", "as `prepare` writes it")
    return Options(**known)


def tokenizer_in(config: Config, wanted: dict[str, Any]) -> str:
    """As prepare's --tokenizer: a model's own is that of the weights which the run began from.

    Raises:
        BadInput: it was another, of which the manifest has no copy.
    """
    about = wanted.get("tokenizer")
    if wanted.get("requested_tokenizer") == "char" or not isinstance(about, dict) or about.get("kind") == "gpt2":
        return "char" if wanted.get("requested_tokenizer") == "char" else "gpt2"
    if (words := words_for(config)) != "gpt2":
        return words
    raise BadInput(
        f"the dataset {config.dataset} is not here, and was in the tokens of a model that the run did not begin from",
        f"a vocabulary of {about.get('vocab_size')} tokens",
        f"gpt2box prepare TEXT --tokenizer FOLDER --name {Path(config.dataset).name}, then the same command again",
    )


def check_weights(config: Config, manifest: dict[str, Any]) -> None:
    """Bring the weights that the run began from, and compare.

    Raises:
        BadInput: they are others.
    """
    wanted = manifest.get("weights")
    if config.init_from == "scratch" or not isinstance(wanted, dict) or not wanted.get("sha256"):
        return
    repo, commit = wanted.get("repo"), wanted.get("commit")
    of_hub = repo and commit and HUB_NAME.fullmatch(config.init_from)
    folder = pretrained_folder(f"{repo}@{commit}" if of_hub else config.init_from)
    found = describe_weights(config.init_from, folder)["sha256"]
    if found != wanted["sha256"]:
        raise BadInput(f"the weights in {folder} are {found}", f"those that the run began from: {wanted['sha256']}")


def say_what_differs(config: Config, manifest: dict[str, Any]) -> None:
    """Between the run's first session and this machine; what alone changes bits, and the rest."""
    then = {key: value for key, value in valid_sessions(manifest)[0].items() if key != "way"}
    device = choose_device(config.device)
    if config.deterministic is True:
        make_deterministic(compiled=False)  # as it then will be: among others a variable of the environment
    now = {**provenance(device), "device_type": device.type}
    of_bits = session_differences(then, now, of_bits=True)
    for line in session_differences(then, now):
        say(f"note: {line}" + (": the bits may differ" if line in of_bits else ""))
