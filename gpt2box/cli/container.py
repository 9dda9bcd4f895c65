"""The image's entrypoint: a gpt2box command, or any other program as given.

docker run gpt2box                   help
docker run gpt2box sample            gpt2box sample
docker run gpt2box nvidia-smi        nvidia-smi
"""

from __future__ import annotations

import os
import shutil
import signal
import sys

from gpt2box.cli.main import cli
from gpt2box.cli.main import main as gpt2box


def main() -> None:
    """Run what the container was started with. The arguments of `gpt2box` are left as they are."""
    arguments = sys.argv[1:] or ["--help"]
    program, *_ = arguments
    is_own = program in cli.commands or program.startswith("-")
    if not is_own and shutil.which(program):
        os.execvp(program, arguments)
    if not is_own and program == "nvidia-smi":
        print("error: no nvidia-smi here: the container was started without a GPU\n  next: --gpus all", file=sys.stderr)
        sys.exit(3)
    # The first process of a container ignores a signal that it has no handler for.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    sys.argv[1:] = arguments
    gpt2box()


if __name__ == "__main__":
    main()
