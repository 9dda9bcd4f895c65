#!/usr/bin/env bash
# tests/image/make_base_image.sh TAG: build a Debian 12 base image from Debian's packages.
# It replaces the pinned base images on machines that reach no image registry, and includes the machine's own certificate
# authorities.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
source=$(awk '/^URIs:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources)
debootstrap --variant=minbase --include=ca-certificates bookworm "$folder" "$source" >/dev/null
cp /etc/apt/sources.list.d/debian.sources "$folder/etc/apt/sources.list.d/" && rm -f "$folder/etc/apt/sources.list"
cp -r /usr/local/share/ca-certificates/. "$folder/usr/local/share/ca-certificates/"
chroot "$folder" update-ca-certificates >/dev/null 2>&1
chroot "$folder" apt-get clean
tar -C "$folder" -c . | docker import - "$1" >/dev/null
