#!/bin/sh
# Install the locked CPU stack into a virtual environment: requirements/install.sh .venv
# PyTorch's CPU build where pip finds one (200 MB), else the index's default build (3 GB on Linux).
set -eu
here=$(dirname "$0")
pip="$1/bin/python -m pip --disable-pip-version-check -qq"

torch=cpu-torch.lock
if ! $pip install --dry-run --no-deps --require-hashes -r "$here/$torch" >/dev/null 2>&1; then
    torch=cpu-torch-default.lock
    echo "No CPU build of PyTorch found by pip; installing the default build (a larger download)." >&2
fi
$pip install --require-hashes -r "$here/cpu.lock" -r "$here/$torch"
$pip install --no-deps --no-build-isolation --editable "$here/.."
