#!/bin/sh
# Install a stack's locked packages into a virtual environment: requirements/install.sh VENV [cpu|cu121|cu13x]
# It uses uv if that is on the PATH, else pip.
set -eu
here=$(dirname "$0")
venv=$1
stack=${2:-cpu}
if command -v uv >/dev/null; then
    export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
    pip="uv pip install --quiet --python $venv/bin/python --compile-bytecode"
else
    pip="$venv/bin/python -m pip install -qq --disable-pip-version-check"
fi

locks="--requirement $here/$stack.lock"
if [ "$stack" = cpu ]; then
    # Install PyTorch's CPU build (200 MB) if it is available, else the index's default build (3 GB on Linux).
    torch=cpu-torch.lock
    if ! $pip --dry-run --no-deps --require-hashes --requirement "$here/$torch" >/dev/null 2>&1; then
        torch=cpu-torch-default.lock
        echo "No CPU build of PyTorch found; installing the default build (a larger download)." >&2
    fi
    locks="$locks --requirement $here/$torch"
fi
# shellcheck disable=SC2086 # each holds several arguments
$pip --require-hashes $locks
