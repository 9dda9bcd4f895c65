#!/usr/bin/env bash
# Build the image twice from nothing and compare what is in it, file by file: `make image-verify` (STACK=cu121, cu13x, cpu).
# Times of files are not compared: they are those of the build. What else cannot be equal is printed with its reason;
# exit code 1 where something differs without one.
set -euo pipefail
cd "$(dirname "$0")/.."
STACK=${STACK:-cu121}
[ "${CPU:-}" != 1 ] || STACK=cpu
work=$(mktemp -d)
names=(gpt2box-verify-1 gpt2box-verify-2)

tidy_up() {
    rm -rf "$work"
    for name in "${names[@]}"; do
        docker image rm --force "$name:$STACK" "$name:latest" >/dev/null 2>&1 || true
    done
}
trap tidy_up EXIT

contents() { # of an image, a line a file
    local container
    container=$(docker create "$1" --help)
    docker export "$container" | python3 scripts/image_contents.py list
    docker rm "$container" >/dev/null
}

for name in "${names[@]}"; do
    echo "building $name:$STACK, without the cache" >&2
    GPT2BOX_NAME=$name scripts/box.sh image --no-cache --quiet "$@" >&2
    contents "$name:$STACK" >"$work/$name"
done
python3 scripts/image_contents.py compare "$work/${names[0]}" "$work/${names[1]}"
