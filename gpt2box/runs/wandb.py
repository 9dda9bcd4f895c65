"""Log a run's metrics to Weights & Biases if `wandb` is `online` or `offline`.

wandb is imported only then. Its own variables apply (WANDB_API_KEY, WANDB_PROJECT, WANDB_ENTITY, WANDB_BASE_URL); a key
in the environment alone sends nothing. wandb.json in the run's folder keeps the id under which a resumed run continues.
"""

import importlib.util
import json
import netrc
import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpt2box.config.loader import read_yaml
from gpt2box.errors import BadInput, MachineCannot, TryAgain
from gpt2box.utils.files import read_json_object, write_atomically
from gpt2box.utils.paths import in_image


def check_available(mode: str) -> None:
    """Check that W&B is usable, before training starts.

    Raises:
        MachineCannot: it is not installed.
        BadInput: there is no API key.
    """
    if mode == "off":
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder wandb/, which W&B leaves where it ran, has no origin
        raise MachineCannot(
            f"wandb is {mode}, and Weights & Biases is not installed" + (" in the image" if in_image() else ""),
            "the package wandb, or --wandb off; metrics.jsonl and TensorBoard have the same figures",
            "an image with it: FROM gpt2box, USER root, RUN pip install wandb" if in_image() else "pip install wandb",
        )
    if mode == "online" and not has_api_key():
        raise BadInput(
            "wandb is online, and there is no key",
            "WANDB_API_KEY, or what `wandb login` writes",
            "wandb login; or --wandb offline, which needs no account (`wandb sync` can send it later)",
        )


def has_api_key() -> bool:
    """Return True if there is an API key in one of the places where W&B looks."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    for path in (
        [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    ):
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


class WandbRun:
    """An open W&B run."""

    def __init__(self, folder: Path, mode: str) -> None:
        import wandb

        saved = read_json_object(folder / "wandb.json")
        name = str(saved.get("id") or secrets.token_hex(4))
        project = os.environ.get("WANDB_PROJECT") or str(saved.get("project") or "gpt2box")
        write_atomically(folder / "wandb.json", json.dumps({"id": name, "project": project}) + "\n")
        try:
            self._run = wandb.init(
                id=name,
                project=project,
                name=folder.name,
                dir=str(folder),
                mode=mode,
                resume="allow" if mode == "online" else None,  # offline, `wandb sync` joins the sessions by id
                config=read_yaml(folder / "config.yaml"),
                save_code=False,
                settings=wandb.Settings(console="off", silent=True, disable_git=True),
            )
        except wandb.errors.Error as error:
            raise TryAgain(
                f"Weights & Biases rejects the run: {error}", next_step="the same command again, or --wandb offline"
            ) from error

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the numbers of a step. For a repeated step, W&B keeps the first."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Wait until everything is written or sent."""
        self._run.finish()
