"""`gpt2box push`: a model to the Hugging Face Hub, as the clean folder that `export` writes, by the Hub's own client.

HF_ENDPOINT and HF_TOKEN are honoured as in the Hub's own tools; the token is sent, and never shown.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2box.data.downloads import hub_endpoint
from gpt2box.data.hub_datasets import offline
from gpt2box.errors import BadInput, Gpt2boxError, TryAgain
from gpt2box.export.export import export, usual_place
from gpt2box.utils.paths import make_writable
from gpt2box.utils.progress import counted, say, size

PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")  # of a repository's name
TOKENS = "https://huggingface.co/settings/tokens"
PASSING = (408, 425, 429)  # HTTP's: and what is 500 or more


def push(folder: Path, repo: str, dtype: str, licence: str, public: bool) -> str:
    """Export the model in `folder`, which reads it back, and upload it; returns its address on the Hub.

    What can be refused is refused before the export is written: a name, a missing or powerless token, a repository that
    is public where a private one is meant.

    Raises:
        BadInput: see above, or what the Hub refuses.
        TryAgain: the Hub does not answer, or HF_HUB_OFFLINE is set.
        Damaged, VolumeUnwritable: see export.
    """
    check_name(repo)
    api = client()
    with of_the_hub(repo):
        private = is_private(api, repo)
    if private is False and not public:
        found = f"{repo} is there already, and public: anyone could have the model"
        raise BadInput(found, "a private repository, unless --public is given", "--public, or another name")
    parent = make_writable(usual_place(folder, "huggingface", "").parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".push-") as temporary:
        made = export(folder, "huggingface", dtype, Path(temporary) / "model", licence, title=repo)
        files = sorted(made.iterdir())
        total = sum(path.stat().st_size for path in files)
        seen = "public" if public and private is not True else "private"
        say(f"to {hub_endpoint()}/{repo} ({seen}): {counted(len(files), 'file')}, {size(total)}")
        for path in files:
            say(f"  {path.name:24} {path.stat().st_size:>15,} bytes")
        if public and private:
            say("note: the repository is there already, and stays private; its settings on the Hub make it public")
        with of_the_hub(repo):
            api.create_repo(repo, private=not public, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=made, commit_message="Upload by gpt2box")
    return f"{hub_endpoint()}/{repo}"


def check_name(repo: str) -> None:
    """By the Hub's own rules.

    Raises:
        BadInput: it is no OWNER/NAME.
    """
    parts = repo.split("/")
    sound = len(parts) == 2 and all(PART.fullmatch(part) and "--" not in part and ".." not in part for part in parts)
    if not sound or repo.endswith(".git") or len(repo) > 96:
        expected = (
            "OWNER/NAME: your name on the Hub or an organisation's, and the model's; letters, digits, '-', '_', '.'"
        )
        raise BadInput(f"no repository can be called {repo!r}", expected, "gpt2box push RUN alice/my-gpt2")


def client() -> Any:
    """The Hub's, with its address and the user's token.

    Raises:
        BadInput: no client, or no token.
        TryAgain: HF_HUB_OFFLINE is set.
    """
    if offline():
        raise TryAgain("HF_HUB_OFFLINE is set: nothing is sent", "the network", "unset HF_HUB_OFFLINE")
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError as error:
        next_step = "pip install huggingface_hub"
        raise BadInput("the package huggingface_hub is not installed", "it", next_step) from error
    token = get_token()  # HF_TOKEN, or what `hf auth login` kept
    if not token:
        expected = f"a token that may write, from {TOKENS}"
        raise BadInput("no token for the Hub", expected, "export HF_TOKEN=hf_…, then the same command again")
    return HfApi(endpoint=hub_endpoint(), token=token)


def is_private(api: Any, repo: str) -> bool | None:
    """Whether the repository is; None where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return bool(api.model_info(repo).private)
    except RepositoryNotFoundError:
        return None


@contextmanager
def of_the_hub(repo: str) -> Iterator[None]:
    """Failures of the client as errors of ours.

    Raises:
        BadInput: the Hub refuses.
        TryAgain: it does not answer, or not now.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # What the client lets through of the library under it: requests before its version 1, httpx after.
    of_library: type[BaseException] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (HfHubHTTPError, of_library, OSError, RuntimeError, ValueError) as error:
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        if not isinstance(cause, HfHubHTTPError):
            found = f"{hub_endpoint()}: {without_token(str(cause)) or type(cause).__name__}"
            raise TryAgain(found, "network", "the same command again, when the network is back") from None
        raise refusal(repo, cause.response.status_code, without_token(cause.server_message or "no reason")) from None


def refusal(repo: str, status: int, said: str) -> Gpt2boxError:
    """What an answer of the Hub means."""
    if status in (401, 403):
        expected = f"a token that may write to {repo.split('/')[0]}, from {TOKENS}"
        return BadInput(f"the Hub refuses the token (HTTP {status}): {said}", expected, "export HF_TOKEN=hf_…")
    if status in PASSING or status >= 500:
        return TryAgain(f"{hub_endpoint()}: HTTP {status}, {said}", "an answer of the Hub", "try again later")
    return BadInput(f"the Hub refuses {repo} (HTTP {status}): {said}", "a repository of yours")


def without_token(text: str) -> str:
    """The same, should it hold the token."""
    token = os.environ.get("HF_TOKEN", "").strip()
    return " ".join((text.replace(token, "hf_…") if token else text).split())
