#!/usr/bin/env bash
# Provide a Docker engine with Compose 2 for the image tests. If there is none, install Debian 13's packages, which also
# run on Debian 12, and start a daemon. Print the process id of that daemon, or nothing if an engine was running.
set -euo pipefail

is_docker_ready() { # the engine answers, and Compose has !reset and the other features of compose.yaml
    docker info >/dev/null 2>&1 && docker buildx version >/dev/null 2>&1 &&
        printf '2.24.0\n%s\n' "$(docker compose version --short 2>/dev/null || echo 0)" | sort -VC
}

install_docker() {
    [ "$(id -u)" = 0 ] && [ -f /etc/apt/sources.list.d/debian.sources ] || {
        echo "no Docker engine with Compose 2.24 or newer, and only root on Debian can install one here" >&2
        exit 3
    }
    # Add the machine's own package source for the next release, with a priority so low that only named packages use it.
    awk 'BEGIN { RS = ""; ORS = "\n\n" } !/security/' /etc/apt/sources.list.d/debian.sources |
        sed 's/^Suites:.*/Suites: trixie/' >/etc/apt/sources.list.d/gpt2box-trixie.sources
    printf 'Package: *\nPin: release n=trixie\nPin-Priority: 100\n' >/etc/apt/preferences.d/gpt2box-trixie
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends docker.io/trixie docker-cli \
        docker-buildx docker-compose/trixie containerd/bookworm iptables debootstrap >/dev/null
}

export PATH=/usr/bin:$PATH # another client earlier on the PATH may lack buildx
if ! is_docker_ready; then
    # Do not install if the distribution has a newer Compose or the daemon is just not running.
    { [ -x /usr/sbin/dockerd ] && docker compose version >/dev/null 2>&1; } || install_docker >&2
    setsid dockerd >/tmp/gpt2box-dockerd.log 2>&1 </dev/null &
    pid=$!
    for _ in $(seq 60); do
        is_docker_ready && break
        kill -0 "$pid" 2>/dev/null || { tail -5 /tmp/gpt2box-dockerd.log >&2; exit 3; }
        sleep 1
    done
    is_docker_ready || { echo "the Docker engine did not answer within a minute" >&2; exit 3; }
    echo "$pid"
fi
