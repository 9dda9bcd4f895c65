#!/usr/bin/env bash
# A Docker engine with Compose 2 for the image tests: the one that is there, or Debian 13's packages, which also run on
# Debian 12, and a daemon started for these tests. Prints the process id of a daemon it started, else nothing.
set -euo pipefail

enough() { # an engine that answers, and a Compose that knows !reset and the features of compose.yaml
    docker info >/dev/null 2>&1 && docker buildx version >/dev/null 2>&1 &&
        printf '2.24.0\n%s\n' "$(docker compose version --short 2>/dev/null || echo 0)" | sort -VC
}

install() {
    [ "$(id -u)" = 0 ] && [ -f /etc/apt/sources.list.d/debian.sources ] || {
        echo "no Docker engine with Compose 2.24 or newer, and only root on Debian can install one here" >&2
        exit 3
    }
    # The machine's own source, of the next release; at a priority at which only what is asked for comes from it.
    awk 'BEGIN { RS = ""; ORS = "\n\n" } !/security/' /etc/apt/sources.list.d/debian.sources |
        sed 's/^Suites:.*/Suites: trixie/' >/etc/apt/sources.list.d/gpt2box-trixie.sources
    printf 'Package: *\nPin: release n=trixie\nPin-Priority: 100\n' >/etc/apt/preferences.d/gpt2box-trixie
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends docker.io/trixie docker-cli \
        docker-buildx docker-compose/trixie containerd/bookworm iptables debootstrap >/dev/null
}

export PATH=/usr/bin:$PATH # another client earlier on the PATH may lack buildx
if ! enough; then
    # A newer Compose in the distribution, or an engine whose daemon is not running, needs no second installation.
    { [ -x /usr/sbin/dockerd ] && docker compose version >/dev/null 2>&1; } || install >&2
    setsid dockerd >/tmp/gpt2box-dockerd.log 2>&1 </dev/null &
    pid=$!
    for _ in $(seq 60); do
        enough && break
        kill -0 "$pid" 2>/dev/null || { tail -5 /tmp/gpt2box-dockerd.log >&2; exit 3; }
        sleep 1
    done
    enough || { echo "the Docker engine did not answer within a minute" >&2; exit 3; }
    echo "$pid"
fi
