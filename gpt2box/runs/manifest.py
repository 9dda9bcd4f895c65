"""Write and check a run's records: config.yaml, plan.json, and manifest.json with its inputs and sessions."""

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gpt2box.config import loader
from gpt2box.config.schema import CHANGEABLE, Config, can_change_on_resume
from gpt2box.config.validation import validate
from gpt2box.data.dataset import SPLITS, Dataset
from gpt2box.data.downloads import sha256_of
from gpt2box.data.pretrained import HUB_REVISIONS
from gpt2box.errors import BadInput, Damaged
from gpt2box.planner.run_plan import RunPlan
from gpt2box.runs.sessions import recorded_sessions, session_at_step, session_differences, valid_sessions
from gpt2box.utils.files import read_json, read_json_object, write_atomically
from gpt2box.utils.progress import format_bytes, log_line

FORMAT = 2  # of manifest.json; 1 lacked settings and weights
LARGE_FILE_BYTES = 1 << 30  # whose checksum takes a second or more
DAMAGED_COPY_NAME = "manifest.json.damaged"
MAX_LISTED_FILES = 1000  # of a dataset; a longer list is recorded as its checksum


def check_settings_unchanged(
    config: Config, dataset: Dataset, run: Path, allow: Collection[str] = (), step: int = 0
) -> dict[str, Any]:
    """Check that a run resumes, from `step`, with its original settings and dataset.

    Settings that do not affect the result may differ, as may those named in `allow`.

    Returns: the previous value of each setting that differs.

    Raises:
        BadInput: lists the settings that must not differ.
        Damaged: the original settings are lost.
    """
    before = load_run_settings(run)
    began = read_manifest(run)
    if not began:
        log_line(
            f"note: {run / 'manifest.json'} is {'damaged' if os.path.lexists(run / 'manifest.json') else 'missing'}: "
            "the dataset cannot be compared with the original, and the record of earlier sessions is lost"
        )
    elif not is_same_dataset(began["dataset"]["splits"], describe_dataset(dataset, began)["splits"]):
        raise BadInput(
            f"the dataset in {dataset.folder} is not the one that the run {config.name} began with",
            f"the same text: {began['dataset']['splits']}",
            f"prepare it as it was, or begin another run with --name {config.name}-2",
        )
    differing = [key for key in Config.model_fields if getattr(before, key) != getattr(config, key)]
    if refused := [key for key in differing if not can_change_on_resume(key) and key not in allow]:
        lines = [f"{key}: {getattr(before, key)} before, {getattr(config, key)} now" for key in refused]
        allowable = [key for key in refused if key in CHANGEABLE]
        asked = "".join(f" --allow-change {key.replace('_', '-')}" for key in allowable)
        raise BadInput(
            f"the run {config.name} began with other settings:\n    " + "\n    ".join(lines),
            "the same settings to resume",
            f"undo the change, or begin another run with --name {config.name}-2"
            + (f"; to resume with the change:{asked}" if allowable == refused else ""),
        )
    for key in differing:
        moves_schedule = key == "max_steps" and config.decay_steps is None and config.lr_schedule != "constant"
        tail = "; the learning rate's schedule now ends there" if moves_schedule else ""
        if key == "max_steps" and config.max_steps < step:
            tail = f", which the run is past: it is at step {step:,}, and nothing is left to do"
        log_line(f"note: {key}: {getattr(before, key)} before, {getattr(config, key)} now{tail}")
    return {key: getattr(before, key) for key in differing}


def parse_allowed_changes(given: Sequence[str]) -> tuple[str, ...]:
    """Return the settings named by --allow-change.

    Raises BadInput: one is unknown, needs no permission, or must never change.
    """
    keys = tuple(key.replace("-", "_") for key in given)
    for key in keys:
        if key not in CHANGEABLE:
            known = key in Config.model_fields
            reason = (
                "no such setting"
                if not known
                else "it may change without"
                if can_change_on_resume(key)
                else "it must not change in a run"
            )
            raise BadInput(f"--allow-change {key}: {reason}", f"one of: {', '.join(CHANGEABLE)}")
    return keys


def load_run_settings(run: Path) -> Config:
    """Load a run's settings of its last session, from config.yaml or, if that is lost, from manifest.json.

    Raises:
        BadInput: they are invalid.
        Damaged: both are lost.
    """
    path, manifest = run / "config.yaml", run / "manifest.json"
    if path.exists() and (values := loader.read_yaml(path)):
        return validate(values, str(path))
    values = read_json_object(manifest).get("settings") or {}
    if not values or not isinstance(values, dict):
        raise Damaged(
            f"the settings of {run.name} are lost: neither {path} nor {manifest} has them",
            "one of them",
            f"restore it from a backup; or start another run from the weights: --init-from {run}/checkpoints/last",
        )
    log_line(f"note: {path} is {'empty' if path.exists() else 'missing'}: using the settings in {manifest.name}")
    return validate(values, str(manifest))


def read_plan(run: Path) -> dict[str, Any]:
    """Read plan.json; empty if the file is missing or damaged. Values are not checked."""
    return read_json_object(run / "plan.json")


def read_manifest(run: Path) -> dict[str, Any]:
    """Read manifest.json; empty if it is missing or damaged."""
    try:
        content: dict[str, Any] = read_json(run / "manifest.json")
        return content if isinstance(content["dataset"]["splits"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def warn_if_not_bit_exact(run: Path, session: dict[str, Any]) -> None:
    """Print what keeps a resumed run from being bit-identical: another execution, another machine."""
    before = valid_sessions(read_manifest(run))
    last = session_at_step(before, max(session["step"] - 1, 0)) if before else session
    for line in session_differences(last, session, bits_only=True):
        log_line(f"note: {line}: from here on the run is not bit-identical to an uninterrupted one")


def write_run_records(
    run: Path, config: Config, plan: RunPlan, dataset: Dataset, session: dict[str, Any], weights: Path | None
) -> None:
    """Write manifest.json, plan.json and config.yaml at the start of a session.

    config.yaml comes last: a run killed before that detects and records the same settings change again.
    """
    path = run / "manifest.json"
    before = read_json_object(path)
    if os.path.lexists(path) and not read_manifest(run):
        os.replace(path, run / DAMAGED_COPY_NAME)
        log_line(f"note: the damaged manifest.json is kept as {DAMAGED_COPY_NAME}")
    known = (
        before.get("weights") if plan.config.lora_rank == 0 or session["step"] else None
    )  # LoRA reads the base weights at every start
    manifest = {
        "format": FORMAT,
        "name": config.name,
        "settings": config.model_dump(mode="json"),
        "seed": config.seed,
        "plan": plan.as_dict(),
        "weights": known or describe_weights(config.init_from, weights),
        "dataset": {"folder": str(dataset.folder), **describe_dataset(dataset, before)},
        "checked": file_stamps(dataset),
        "sessions": [*recorded_sessions(before), session],
    }
    write_atomically(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    write_atomically(run / "plan.json", json.dumps(plan.as_dict(), indent=2) + "\n")
    write_atomically(run / "config.yaml", loader.config_to_yaml(config))


def file_stamps(dataset: Dataset) -> dict[str, list[int]]:
    """Return size and mtime (ns) of a dataset's files: while they stay, a comparison by checksum stays valid."""
    files = sorted([*dataset.folder.glob("*.bin"), *dataset.folder.glob("*.mask")])
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def describe_dataset(dataset: Dataset, before: dict[str, Any]) -> dict[str, Any]:
    """Return a dataset's manifest, with a long list of files replaced by its sha256.

    A nanoGPT folder has no manifest: its token counts and checksums are returned. `before`: a run's manifest, whose
    checksum is reused while the files are untouched.
    """
    if not dataset.manifest:
        splits: dict[str, Any] = {split: {"tokens": dataset.tokens(split)} for split in SPLITS}
        splits["train"]["sha256"] = cached_train_sha256(dataset, before) or sha256_of_tokens(
            dataset.folder / "train.bin", *file_stamps(dataset)["train.bin"]
        )
        return {"source": "a folder as nanoGPT's", "splits": splits | {"val_digest": dataset.digest}}
    about = dict(dataset.manifest)
    files = about.get("documents")
    if isinstance(files, list) and len(files) > MAX_LISTED_FILES:
        about["documents"] = {"count": len(files), "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}
    return about


def cached_train_sha256(dataset: Dataset, before: dict[str, Any]) -> str:
    """Return the checksum of train.bin that a run's manifest recorded; empty if the files were touched since."""
    try:
        return str(before["dataset"]["splits"]["train"]["sha256"]) if before["checked"] == file_stamps(dataset) else ""
    except (KeyError, TypeError):
        return ""


@cache
def sha256_of_tokens(path: Path, size_bytes: int, mtime_ns: int) -> str:
    """Return a file's checksum, cached in this process by size and mtime."""
    if size_bytes > LARGE_FILE_BYTES:
        log_line(f"computing the checksum of {format_bytes(size_bytes)} of tokens")
    return sha256_of(path)


def is_same_dataset(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Compare the splits in two manifests. Early versions have no checksum of a nanoGPT train.bin: it is skipped."""
    train = before.get("train")
    if isinstance(train, dict) and "val_digest" in before:
        before = {**before, "train": {"sha256": now.get("train", {}).get("sha256"), **train}}
    return before == now


def describe_weights(init_from: str, folder: Path | None) -> dict[str, Any]:
    """Describe the initial weights: Hub repository and commit, and the sha256 of each file."""
    if folder is None:
        return {"init_from": init_from}
    hub = read_json_object(folder / "hub.json")
    commit = hub.get("commit") or (HUB_REVISIONS.get(init_from) if folder.name in HUB_REVISIONS else None)
    files = {path.name: sha256_of(path) for path in sorted(folder.glob("model*.safetensors"))}
    return {"init_from": init_from, "repo": hub.get("repo"), "commit": commit, "sha256": files}
