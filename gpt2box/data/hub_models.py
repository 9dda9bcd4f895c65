"""Download models of GPT-2's architecture from the Hugging Face Hub: OWNER/NAME, or OWNER/NAME@REVISION."""

import hashlib
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2box.data import downloads, hf_tokenizer
from gpt2box.data.downloads import Asset, hub_endpoint
from gpt2box.data.hub_datasets import fetch_json, fetch_with_retries
from gpt2box.errors import BadInput, Damaged
from gpt2box.utils.files import fsync_dir, read_json, read_json_object, write_atomically
from gpt2box.utils.paths import ensure_writable, model_dir, raw_dir
from gpt2box.utils.progress import format_bytes, log_line

HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
INDEX = "model.safetensors.index.json"
TOKENIZER = hf_tokenizer.FILES


def hub_model(name: str) -> Path:
    """Return a model's folder in volumes/models; download config, safetensors and tokenizer unless present.

    The revision is resolved to a commit, recorded in hub.json. Each file is checked against the Hub's size and hash at
    that commit. Interrupted downloads resume; a partial model is never visible.

    Raises:
        BadInput: no such model, no safetensors, or another revision of it is there.
        Damaged: a file is not what the Hub says.
        TryAgain: the Hub does not answer.
    """
    return fetch_repository(name, model_dir(folder_name(name)), "config.json", download_model)


def hub_tokenizer(name: str) -> Path:
    """Return a folder with a Hub model's tokenizer: the local model's, else only the tokenizer's files.

    Raises:
        See hub_model.
    """
    if (model_dir(folder_name(name)) / "config.json").is_file():
        return hub_model(name)
    return fetch_repository(name, raw_dir() / "tokenizers" / folder_name(name), "hub.json", download_tokenizer)


def folder_name(name: str) -> str:
    """Return OWNER--NAME."""
    return name.partition("@")[0].replace("/", "--")


def fetch_repository(
    name: str, folder: Path, proof: str, download_files: Callable[[str, dict[str, Any], str, Path], None]
) -> Path:
    """Return the folder of a repository; if it lacks the file `proof`, `download_files` fills it."""
    matched = HUB_NAME.fullmatch(name)
    assert matched, name
    repo, revision = matched.groups()
    there = read_json_object(folder / "hub.json")
    if (folder / proof).is_file():
        if revision and revision not in (there.get("asked"), there.get("commit")):
            found = f"{folder} is {repo} at {there.get('asked') or 'an unknown revision'}"
            raise BadInput(found, f"revision {revision}", f"move {folder} away")
        return folder
    quoted = urllib.parse.quote(repo)
    about = fetch_json(
        f"{hub_endpoint()}/api/models/{quoted}/revision/{urllib.parse.quote(revision or 'main', safe='')}"
    )
    commit = str(about["sha"])
    entries = {entry["path"]: entry for entry in fetch_json(f"{hub_endpoint()}/api/models/{quoted}/tree/{commit}")}
    temporary = ensure_writable(folder.with_name(f".{folder.name}.tmp"))
    if read_json_object(temporary / "hub.json").get("commit") != commit:
        for stale in temporary.iterdir():
            stale.unlink()
    write_atomically(temporary / "hub.json", json.dumps({"repo": repo, "asked": revision or "main", "commit": commit}))
    try:
        download_files(repo, entries, f"{hub_endpoint()}/{quoted}/resolve/{commit}", temporary)
    except BadInput:
        shutil.rmtree(temporary)  # nothing that would go on
        raise
    os.rename(temporary, folder)
    fsync_dir(folder.parent)
    return folder


def download_model(repo: str, entries: dict[str, Any], url: str, folder: Path) -> None:
    """Download a model's files into a folder; checks the architecture before the weights.

    Raises BadInput: it is no GPT-2, or has no safetensors.
    """
    if "config.json" not in entries:
        raise BadInput(f"{repo} has no config.json", f"a GPT-2 for transformers; it has: {', '.join(entries)}")
    kind = read_json_object(fetch_file("config.json", entries["config.json"], url, folder)).get("model_type")
    if kind != "gpt2":
        raise BadInput(f"{repo} is of model_type {kind!r}", "'gpt2'")
    weights = [path for path in ("model.safetensors", INDEX) if path in entries][:1]
    if not weights:
        pickled = any(path.endswith(".bin") for path in entries)
        raise BadInput(
            f"{repo} has no safetensors" + (" but pickled weights, which can run any code" if pickled else ""),
            "model.safetensors",
            "another revision (the Hub's robot offers some as @refs/pr/N), or convert it with transformers yourself",
        )
    for path in [*(path for path in TOKENIZER if path in entries), *weights]:
        fetch_file(path, entries[path], url, folder)
    if weights == [INDEX]:
        try:
            shards = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
            found = [(shard, entries[shard]) for shard in shards]
        except (ValueError, KeyError, AttributeError) as error:
            raise BadInput(f"{repo}: {INDEX} names what is not there ({error})", "its shards") from error
        for shard, entry in found:
            fetch_file(shard, entry, url, folder)


def download_tokenizer(repo: str, entries: dict[str, Any], url: str, folder: Path) -> None:
    """Download the tokenizer's files into a folder.

    Raises BadInput: the model has no tokenizer of a supported kind.
    """
    found = [path for path in TOKENIZER if path in entries]
    if not {"tokenizer.json", "vocab.json"} & set(found):
        raise BadInput(
            f"{repo} has no tokenizer of a kind that is read here; it has: {', '.join(entries)}", hf_tokenizer.EXPECTED
        )
    for path in found:
        fetch_file(path, entries[path], url, folder)


def fetch_file(path: str, entry: dict[str, Any], url: str, folder: Path) -> Path:
    """Download and verify one file: large ones by sha256, small ones by their git hash.

    Raises Damaged: it is not what the Hub says.
    """
    sha256 = str(entry.get("lfs", {}).get("oid", ""))
    if sha256:
        log_line(f"{path}: {format_bytes(entry['size'])}")
    asset = Asset(path, int(entry["size"]), sha256, f"{url}/{path}")
    file = fetch_with_retries(lambda: downloads.fetch(asset, folder), path)
    if not sha256:
        content = file.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if found != entry["oid"]:
            file.unlink()
            raise Damaged(f"{asset.url} has git hash {found}", str(entry["oid"]), "try again")
    return file
