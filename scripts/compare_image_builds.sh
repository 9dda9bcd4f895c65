#!/usr/bin/env bash
# Build the image twice without the cache and compare the files: `make image-verify` (STACK=cu121, cu13x, cpu).
# Modification times are not compared: they are those of the build. Other differences that cannot be avoided are printed
# with their reason; the exit code is 1 if there is any other.
set -euo pipefail
cd "$(dirname "$0")/.."
STACK=${STACK:-cu121}
[ "${CPU:-}" != 1 ] || STACK=cpu
work=$(mktemp -d)
names=(gpt2box-verify-1 gpt2box-verify-2)

clean_up() {
    rm -rf "$work"
    for name in "${names[@]}"; do
        docker image rm --force "$name:$STACK" "$name:latest" >/dev/null 2>&1 || true
    done
}
trap clean_up EXIT

list_contents() { # IMAGE: print one line per file
    local container
    container=$(docker create "$1" --help)
    docker export "$container" | python3 scripts/image_contents.py list
    docker rm "$container" >/dev/null
}

for name in "${names[@]}"; do
    echo "building $name:$STACK, without the cache" >&2
    GPT2BOX_NAME=$name scripts/compose.sh image --no-cache --quiet "$@" >&2
    list_contents "$name:$STACK" >"$work/$name"
done
python3 scripts/image_contents.py compare "$work/${names[0]}" "$work/${names[1]}"
