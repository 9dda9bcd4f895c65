"""List and download datasets of the Hugging Face Hub as Parquet files: pinned OpenWebText, and others by name.

HF_ENDPOINT and HF_TOKEN are honoured as in the Hub's own tools. With HF_HUB_OFFLINE=1 only local files are
used.
"""

import fcntl
import http.client
import json
import os
import re
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2box.data import downloads
from gpt2box.data.downloads import Asset, hub_endpoint
from gpt2box.data.tokenize_workers import SourceFile
from gpt2box.errors import BadInput, Damaged, TryAgain
from gpt2box.utils.files import read_json_object, write_atomically
from gpt2box.utils.paths import ensure_writable, raw_dir
from gpt2box.utils.progress import log_line

TRANSIENT_FOLDER = "passing"  # inside a corpus's folder: files that are dropped once they are tokenised
OPEN_LOCK_FILES: dict[Path, int] = {}  # lock files
OPEN_LOCK = threading.Lock()
DOWNLOAD_ATTEMPTS = 4  # of a download, which resumes where it broke off


@dataclass(frozen=True)
class Pinned:
    """Describe a dataset with known content."""

    repo: str
    revision: str
    folder: str
    files: int
    size_bytes: int
    documents: int


# The Parquet files that the Hub's maintainers made when the dataset's script was removed; 8,013,769 documents.
OPENWEBTEXT = Pinned(
    "Skylion007/openwebtext", "79d93d786212f7344586290adb811d4ae6a1762c", "plain_text", 80, 24_193_092_408, 8_013_769
)
# Size and hash of the first of the 80 files; the others are queried from the Hub at that revision and cached.
KNOWN_FILES = {
    "train-00000-of-00080.parquet": (302_848_326, "caed9f4b7053d7cd4d1a13ce9ec9224d84a3bba1f11579193562a7e31ebe656e")
}


def list_openwebtext_sources(keep_raw: bool) -> tuple[list[SourceFile], list[dict[str, Any]]]:
    """List OpenWebText's files on the Hub, with their identities for the manifest.

    Raises TryAgain: the Hub does not answer.
    """
    pin = OPENWEBTEXT
    names = [f"train-{i:05d}-of-{pin.files:05d}.parquet" for i in range(pin.files)]
    pins = list_openwebtext(pin, names)
    base = f"{hub_endpoint()}/datasets/{pin.repo}/resolve/{pin.revision}/{pin.folder}"
    files = [Asset(name, *pins[name], f"{base}/{name}") for name in names]
    identity = [{"name": name, "bytes": pins[name][0], "sha256": pins[name][1]} for name in names]
    return [download_source(file, raw_dir() / "openwebtext", keep_raw) for file in files], identity


def list_openwebtext(pin: Pinned, names: list[str]) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of each of OpenWebText's files. Raises Damaged: the Hub contradicts the pinned values."""
    path = raw_dir() / "openwebtext" / "files.json"
    found = list_repository_files(f"datasets/{pin.repo}", pin.revision, pin.folder, names, path)
    total = sum(size for size, _ in found.values())
    if any(found[name] != expected for name, expected in KNOWN_FILES.items()) or total != pin.size_bytes:
        raise Damaged(f"{path} is not the list of the pinned files ({total:,} bytes)", f"{pin.size_bytes:,} bytes")
    return found


def list_repository_files(
    repo: str, revision: str, folder: str, names: list[str], kept: Path
) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of files in a Hub repository (models/… or datasets/…) at a revision.

    A revision is a commit hash, so the answer never changes; it is cached in the file `kept`.

    Raises Damaged: the answer lacks a file.
    """
    stored = read_json_object(kept)
    if stored.get("revision") != revision:
        answer = fetch_json(f"{hub_endpoint()}/api/{repo}/tree/{revision}/{folder}".rstrip("/"))
        try:
            entries = {Path(entry["path"]).name: entry for entry in answer if entry.get("type") == "file"}
            pins = {name: (int(entries[name]["size"]), str(entries[name]["lfs"]["oid"])) for name in names}
        except (KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"the Hub's list of {repo} lacks {error}", f"{len(names)} files with their sha256") from error
        stored = {"revision": revision, "files": pins}
        ensure_writable(kept.parent)
        write_atomically(kept, json.dumps(stored, indent=1))
    try:
        return {name: (int(stored["files"][name][0]), str(stored["files"][name][1])) for name in names}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise Damaged(f"{kept} lacks {error}", f"{len(names)} files with their sha256", f"remove {kept}") from error


def list_hub_dataset(name: str, config: str, split: str, files: slice, keep_raw: bool) -> tuple[list[SourceFile], str]:
    """List the Parquet files into which the Hub converts a dataset, or some of them.

    Returns the files and a description of the dataset.

    Raises:
        BadInput: no such dataset, configuration or split.
        TryAgain: the Hub does not answer.
    """
    answer = fetch_json(f"{hub_endpoint()}/api/datasets/{urllib.parse.quote(name)}/parquet")
    config = config or ("default" if "default" in answer else next(iter(answer), ""))
    if config not in answer:
        raise BadInput(f"{name} has no configuration {config!r}", f"one of: {', '.join(answer)}", "--hub-config NAME")
    if split not in answer[config]:
        raise BadInput(f"{name} has no split {split!r}", f"one of: {', '.join(answer[config])}", "--hub-split NAME")
    folder = raw_dir() / name.replace("/", "--")
    sources = []
    for index, url in list(enumerate(answer[config][split]))[files]:
        asset = Asset(f"{config}-{split}-{index:05d}.parquet", *fetch_size_and_digest(url), url)
        sources.append(download_source(asset, folder, keep_raw))
    return sources, f"the Hub's {name}, {config}, {split}"


def make_local_source(path: Path) -> SourceFile:
    """Return the source of a local file. Raises BadInput: it is not there."""
    if not path.is_file():
        raise BadInput(f"no file {path}", "a file")
    return SourceFile(path.name, path.stat().st_size, lambda: path, lambda: None, lambda: None)


def download_source(asset: Asset, folder: Path, keep_raw: bool) -> SourceFile:
    """Return the source of a file that is downloaded on demand and deleted once tokenized, unless it is kept.

    Files to be deleted lie in a folder of their own, so that they are still known after a kill. A lock gives a file to
    one job at a time: else the first would delete it while the second reads it. All jobs use the files in the same
    order, so the job furthest behind can always go on.
    """
    passing = folder / TRANSIENT_FOLDER

    def lock(kind: int) -> None:
        # A byte of one file stands for the asset. Of the open file (since Linux 3.15), not of the process as lockf's:
        # there the system takes two jobs that wait for each other's next file for a deadlock, and fails one.
        one_byte = struct.pack("hhqqi4x", kind, os.SEEK_SET, zlib.crc32(asset.filename.encode()), 1, 0)
        fcntl.fcntl(open_lock_file(folder), fcntl.F_OFD_SETLKW, one_byte)

    def fetch() -> Path:
        lock(fcntl.F_WRLCK)
        place = folder if keep_raw or (folder / asset.filename).exists() else passing
        if keep_raw and (passing / asset.filename).exists():
            os.replace(passing / asset.filename, folder / asset.filename)
        return fetch_with_retries(lambda: downloads.fetch(asset, ensure_writable(place), quiet=True), asset.filename)

    def unlock() -> None:
        lock(fcntl.F_UNLCK)

    def discard() -> None:
        (passing / asset.filename).unlink(missing_ok=True)
        unlock()

    return SourceFile(asset.filename, asset.size_bytes, fetch, discard, unlock, asset.sha256)


def open_lock_file(folder: Path) -> int:
    """Return the descriptor of a corpus's lock file, open until the process ends, which frees its locks.

    Opened once per process: a lock taken through one descriptor cannot be released through another.
    """
    with OPEN_LOCK:
        if folder not in OPEN_LOCK_FILES:
            OPEN_LOCK_FILES[folder] = os.open(ensure_writable(folder) / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        return OPEN_LOCK_FILES[folder]


def fetch_with_retries(fetch: Callable[[], Path], what: str) -> Path:
    """Retry when the network fails; a download resumes where it broke off."""
    for attempt in range(DOWNLOAD_ATTEMPTS - 1):
        try:
            return fetch()
        except TryAgain as error:
            if is_offline():
                raise
            log_line(f"note: {what}: {error.found.splitlines()[-1].strip()}; trying again in {2**attempt * 5} s")
            time.sleep(2**attempt * 5)
    return fetch()


def is_offline() -> bool:
    """Return True if HF_HUB_OFFLINE is set, as the Hub's own tools read it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def open_url(url: str, method: str = "GET", opener: urllib.request.OpenerDirector | None = None) -> Any:
    """Open a URL, with HF_TOKEN if it is on the Hub."""
    if is_offline():
        raise TryAgain(
            f"{url} is needed, but HF_HUB_OFFLINE is set", "network", "unset HF_HUB_OFFLINE, or give a folder"
        )
    wanted = urllib.request.Request(url, headers={"User-Agent": "gpt2box"}, method=method)
    if (token := os.environ.get("HF_TOKEN")) and url.startswith(hub_endpoint()):
        wanted.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return (opener or urllib.request.build_opener()).open(wanted, timeout=downloads.TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code in (301, 302, 303, 307, 308):
            return error  # an answer to those who do not follow
        if error.code in (401, 403, 404):
            raise BadInput(
                f"{url}: HTTP {error.code} {error.reason}", "a public dataset, or one that HF_TOKEN may read"
            ) from error
        raise TryAgain(f"{url}: HTTP {error.code} {error.reason}", "an answer", "try again later") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise TryAgain(
            f"{url}: {reason}", "network", "try again with network, or give the files in a folder"
        ) from error


def fetch_json(url: str) -> Any:
    """Fetch JSON from the Hub's API."""
    with open_url(url) as response:
        try:
            return json.loads(response.read())
        except (ValueError, OSError) as error:
            raise TryAgain(f"{url}: no JSON ({error})", "an answer of the Hub", "try again later") from error


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Return redirects in place of following them."""

    def redirect_request(self, *_: Any) -> None:
        return None


def fetch_size_and_digest(url: str) -> tuple[int, str]:
    """Return the size of an unpinned file, and its sha256 if the Hub's redirect states it."""
    headers = open_url(url, "HEAD", urllib.request.build_opener(NoRedirect)).headers
    digest = (headers.get("X-Linked-ETag") or "").strip('"')
    size = int(headers.get("X-Linked-Size") or headers.get("Content-Length") or 0)
    return size, digest if re.fullmatch("[0-9a-f]{64}", digest) else ""
