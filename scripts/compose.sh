#!/usr/bin/env bash
# Run the Makefile's container tasks: check Docker first, then run, and return the job's exit code.
#   scripts/compose.sh image [OPTION...]           options go to `docker build`
#   scripts/compose.sh preflight JOB [OPTION...]
#   scripts/compose.sh job JOB [OPTION...]         preflight, fetch, train; options go to each of them
#   scripts/compose.sh multi-gpu JOB [OPTION...]   like job, but train on all GPUs
#   scripts/compose.sh run SERVICE [ARGUMENT...]   one service of compose.yaml, such as sample
#   scripts/compose.sh stop                        stop all containers; training saves a checkpoint first
# CPU=1 needs no GPU. STACK, GPU, DATA and the other variables come from the environment or .env.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { # FOUND NEXT [EXIT_CODE]
    printf 'error: %s\n  next: %s\n' "$1" "$2" >&2
    exit "${3:-3}"
}

# --- variables for compose.yaml ---------------------------------------------------------------------------
read_variable() { # NAME DEFAULT: print the value from the environment, else from .env, else the default
    local value=${!1:-}
    if [ -z "$value" ] && [ -f .env ]; then
        value=$(sed -n "s/^$1=//p" .env | tail -1 | sed 's/\r$//; s/[[:space:]]#.*//; s/[[:space:]]*$//; s/^"\(.*\)"$/\1/')
    fi
    printf '%s' "${value:-$2}"
}
STACK=$(read_variable STACK cu121)
[ "${CPU:-}" != 1 ] || STACK=cpu
case $STACK in
cu121 | cu13x) files=(-f compose.yaml) device_options=() ;;
cpu) files=(-f compose.yaml -f compose.cpu.yaml) device_options=(--device cpu) ;;
*) fail "STACK=$STACK" 'STACK=cu121, cu13x or cpu' 2 ;;
esac
DATA=$(read_variable DATA '')
GPT2BOX_UID=$(read_variable GPT2BOX_UID "$(id -u)")
GPT2BOX_GID=$(read_variable GPT2BOX_GID "$(id -g)")
VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' gpt2box/__init__.py)
REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)} # becomes the image's date
LOCK_SHA256=$(cat requirements/"$STACK"*.lock | sha256sum | cut -d' ' -f1)
export STACK DATA GPT2BOX_UID GPT2BOX_GID VERSION REVISION LOCK_SHA256 SOURCE_DATE_EPOCH
image=$(read_variable GPT2BOX_NAME gpt2box):$STACK

# --- checks ---------------------------------------------------------------------------------------------
check_docker() {
    local cpu_hint='or train without Docker, on the CPU: make demo' compose
    command -v docker >/dev/null || fail 'Docker is not installed' "install Docker Engine (docs/containers.md); $cpu_hint"
    docker info >/dev/null 2>&1 ||
        fail "the Docker engine does not answer: $(docker info 2>&1 | tail -1)" "start it, or join the group docker; $cpu_hint"
    compose=$(docker compose version --short 2>/dev/null || echo 0)
    printf '2.24.0\n%s\n' "${compose#v}" | sort -VC ||
        fail "Docker Compose ${compose/#0/(none)}; at least 2.24 is needed" "install it (docs/containers.md); $cpu_hint"
    docker buildx version >/dev/null 2>&1 ||
        fail 'Docker has no buildx, which builds the image' "install it (docs/containers.md); $cpu_hint"
}

check_nvidia() {
    [ "$STACK" != cpu ] || return 0
    local cpu_hint='or without a GPU: the same with CPU=1, or make demo' answer
    # Preflight cannot report a broken driver: no container with a GPU would start.
    if command -v nvidia-smi >/dev/null && ! answer=$(nvidia-smi -L 2>&1); then
        fail "the NVIDIA driver does not answer: ${answer##*$'\n'}" "reboot after an update, or install it anew; $cpu_hint"
    fi
    docker info --format '{{json .Runtimes}}' 2>/dev/null | grep -q nvidia && return
    command -v nvidia-container-runtime-hook nvidia-container-cli >/dev/null && return
    compgen -G '/etc/cdi/nvidia*' >/dev/null && return
    compgen -G '/var/run/cdi/nvidia*' >/dev/null && return
    fail 'Docker has no NVIDIA runtime, so no container sees the GPU' \
        "install the NVIDIA Container Toolkit (docs/containers.md); $cpu_hint"
}

build_image() {
    local options=(--tag "$image")
    # A local folder of wheels, as configured for pip.
    [ "$STACK" != cpu ] || [ ! -d "${PIP_FIND_LINKS:-}" ] || options+=(--build-context "wheelhouse=$PIP_FIND_LINKS")
    [ "$STACK" = cpu ] || options+=(--tag "${image%:*}:latest")
    docker build --build-arg STACK --build-arg VERSION --build-arg REVISION --build-arg LOCK_SHA256 \
        --build-arg SOURCE_DATE_EPOCH "${options[@]}" "$@" .
}

ensure_image() { # build the image unless one of this revision exists; after a change of the source it takes seconds
    local built
    built=$(docker image inspect "$image" --format '{{index .Config.Labels "org.opencontainers.image.revision"}}' \
        2>/dev/null || echo none)
    if [ "$built" = none ] || { [ "$REVISION" != unknown ] && [ "$built" != "$REVISION" ]; }; then
        echo "building the image $image" >&2
        build_image >&2
    fi
}

run_service() { # SERVICE [ARGUMENT...]: run a service in the foreground and return its exit code
    docker compose "${files[@]}" run --rm --no-deps "$@"
}

task=$1
shift
if [ -n "$DATA" ]; then
    [ -e "$DATA" ] || fail "no file or folder $DATA" 'DATA=mybook.txt, or a folder of texts' 2
    DATA=$(realpath "$DATA")
fi
check_docker
case $task in
image)
    build_image "$@"
    ;;
preflight | job | multi-gpu)
    job=$1
    base=${job%-large} && base=${base%-xl} && base=${base%-lora} # variants of finetune use its services
    shift
    check_nvidia
    ensure_image
    mkdir -p volumes/data volumes/models volumes/runs
    options=("$job" ${DATA:+"--dataset=/input/$DATA"} ${device_options[@]+"${device_options[@]}"} "$@")
    run_service "$base-preflight" preflight "${options[@]}"
    if [ "$task" != preflight ]; then
        run_service "$base-prepare" fetch "${options[@]}"
        [ "$task" = job ] || base=multi-gpu
        run_service "$base" train "${options[@]}"
    fi
    ;;
run)
    case $1 in tensorboard | prepare | report) ;; *) check_nvidia ;; esac
    ensure_image
    if [ "$1" = bench ]; then
        mkdir -p volumes/data volumes/models volumes/runs
        set -- "$@" ${device_options[@]+"${device_options[@]}"}
    fi
    case $1 in tensorboard | dashboard) mkdir -p volumes/runs && set -- --service-ports "$@" ;; esac
    if [ "$1" = prepare ]; then
        mkdir -p volumes/data
        set -- "$@" ${DATA:+"/input/$DATA"}
    fi
    run_service "$@"
    ;;
stop)
    project=$(docker compose "${files[@]}" config --format json | sed -n 's/^  "name": "\(.*\)",$/\1/p')
    docker ps --quiet --filter "label=com.docker.compose.project=$project" | xargs --no-run-if-empty docker stop --time 300
    ;;
*)
    fail "no task $task" 'image, preflight, job, multi-gpu, run or stop' 2
    ;;
esac
