"""Upload a model to the Hugging Face Hub, in the format of `gpt2box export`, with the Hub's own client.

HF_ENDPOINT and HF_TOKEN work as in the Hub's own tools. The token is never shown.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2box.data.downloads import hub_endpoint
from gpt2box.data.hub_datasets import is_offline
from gpt2box.errors import BadInput, Gpt2boxError, TryAgain
from gpt2box.export.export import default_path, export_model
from gpt2box.utils.paths import ensure_writable
from gpt2box.utils.progress import format_bytes, log_line, pluralize

NAME_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")  # owner or name of a repository
TOKENS_URL = "https://huggingface.co/settings/tokens"
RETRYABLE_STATUS = (408, 425, 429)  # and every status from 500 on


def push(folder: Path, repo: str, dtype: str, license_id: str, public: bool) -> str:
    """Export the model in `folder`, upload it to `repo`, and return its URL.

    Checks name, token and the repository's visibility before writing the export.

    Raises:
        BadInput: The name or token is invalid, the repository is public but `public` is not set, or the Hub refuses.
        TryAgain: The Hub does not answer, or HF_HUB_OFFLINE is set.
        Damaged, VolumeUnwritable: See export_model.
    """
    check_name(repo)
    api = create_client()
    with translate_hub_errors(repo):
        private = is_private(api, repo)
    if private is False and not public:
        found = f"{repo} is there already, and public: anyone could download the model"
        raise BadInput(found, "a private repository, unless --public is given", "--public, or another name")
    parent = ensure_writable(default_path(folder, "huggingface", "").parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".push-") as temporary:
        exported = export_model(folder, "huggingface", dtype, Path(temporary) / "model", license_id, title=repo)
        files = sorted(exported.iterdir())
        total = sum(path.stat().st_size for path in files)
        visibility = "public" if public and private is not True else "private"
        log_line(f"to {hub_endpoint()}/{repo} ({visibility}): {pluralize(len(files), 'file')}, {format_bytes(total)}")
        for path in files:
            log_line(f"  {path.name:24} {path.stat().st_size:>15,} bytes")
        if public and private:
            log_line(
                "note: the repository is there already, and stays private; make it public in its settings on the Hub"
            )
        with translate_hub_errors(repo):
            api.create_repo(repo, private=not public, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=exported, commit_message="Upload by gpt2box")
    return f"{hub_endpoint()}/{repo}"


def check_name(repo: str) -> None:
    """Check a repository name by the Hub's rules. Raises BadInput: the name is not a valid OWNER/NAME."""
    parts = repo.split("/")
    valid = [NAME_PART.fullmatch(part) and "--" not in part and ".." not in part for part in parts]
    if len(parts) != 2 or not all(valid) or repo.endswith(".git") or len(repo) > 96:
        expected = (
            "OWNER/NAME: your name on the Hub or an organisation's, and the model's; letters, digits, '-', '_', '.'"
        )
        raise BadInput(f"no repository can be called {repo!r}", expected, "gpt2box push RUN alice/my-gpt2")


def create_client() -> Any:
    """Create the Hub's API client with the endpoint and the user's token.

    Raises:
        BadInput: The package huggingface_hub or the token is missing.
        TryAgain: HF_HUB_OFFLINE is set.
    """
    if is_offline():
        raise TryAgain("HF_HUB_OFFLINE is set: nothing is sent", "the network", "unset HF_HUB_OFFLINE")
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError as error:
        next_step = "pip install huggingface_hub"
        raise BadInput("the package huggingface_hub is not installed", "the package", next_step) from error
    token = get_token()  # HF_TOKEN, or the one that `hf auth login` saved
    if not token:
        expected = f"a token with write access, from {TOKENS_URL}"
        raise BadInput("no token for the Hub", expected, "export HF_TOKEN=hf_…, then the same command again")
    return HfApi(endpoint=hub_endpoint(), token=token)


def is_private(api: Any, repo: str) -> bool | None:
    """Tell if the repository is private; None if it does not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return bool(api.model_info(repo).private)
    except RepositoryNotFoundError:
        return None


@contextmanager
def translate_hub_errors(repo: str) -> Iterator[None]:
    """Turn errors of the Hub's client into errors of gpt2box.

    Raises:
        BadInput: The Hub refuses the request.
        TryAgain: The Hub does not answer, or not now.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The client passes on errors of its HTTP library: requests before version 1, httpx after.
    http_error: type[BaseException] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (HfHubHTTPError, http_error, OSError, RuntimeError, ValueError) as error:
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        if not isinstance(cause, HfHubHTTPError):
            found = f"{hub_endpoint()}: {redact_token(str(cause)) or type(cause).__name__}"
            raise TryAgain(found, "network", "the same command again, when the network is back") from None
        message = redact_token(cause.server_message or "no reason")
        raise refusal_error(repo, cause.response.status_code, message) from None


def refusal_error(repo: str, status: int, message: str) -> Gpt2boxError:
    """Return the error for an HTTP status that the Hub answered with."""
    if status in (401, 403):
        expected = f"a token with write access to {repo.split('/')[0]}, from {TOKENS_URL}"
        return BadInput(f"the Hub refuses the token (HTTP {status}): {message}", expected, "export HF_TOKEN=hf_…")
    if status in RETRYABLE_STATUS or status >= 500:
        return TryAgain(f"{hub_endpoint()}: HTTP {status}, {message}", "an answer of the Hub", "try again later")
    return BadInput(f"the Hub refuses {repo} (HTTP {status}): {message}", "a repository of yours")


def redact_token(text: str) -> str:
    """Return the text on one line, with the value of HF_TOKEN replaced."""
    token = os.environ.get("HF_TOKEN", "").strip()
    return " ".join((text.replace(token, "hf_…") if token else text).split())
