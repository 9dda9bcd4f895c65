#!/usr/bin/env bash
# `make test-image`: install Docker if necessary, build the images, then test them. Stops the daemon that it started.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=/usr/bin:$PATH

daemon=$(tests/image/ensure_docker.sh)
trap '[ -z "$daemon" ] || kill "$daemon"' EXIT

# Use the pinned base images, or one built from Debian's packages if no registry is reachable.
bases=()
cpu_base=$(sed -n 's/^ARG CPU_BASE=//p' Dockerfile)
if ! timeout 60 docker pull --quiet "$cpu_base" >/dev/null 2>&1; then
    echo "no image registry: building on a base image made from Debian's packages"
    docker image inspect gpt2box-test-base >/dev/null 2>&1 || tests/image/make_base_image.sh gpt2box-test-base
    bases=(--build-arg CPU_BASE=gpt2box-test-base --build-arg CU121_BASE=gpt2box-test-base)
fi

# The conda stage is not built: it needs a conda channel.
export GPT2BOX_NAME=gpt2box-test # keeps the user's images
export GPT2BOX_BUILD_ARGUMENTS="${bases[*]-} ${PIP_FIND_LINKS:+--build-context wheelhouse=$PIP_FIND_LINKS}"
STACK=cpu scripts/compose.sh image --quiet ${bases[@]+"${bases[@]}"}
STACK=cu121 scripts/compose.sh image --quiet --build-arg PYTHON=distro ${bases[@]+"${bases[@]}"}
.venv/bin/python -m pytest tests/image "$@"
