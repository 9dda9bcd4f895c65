#!/bin/sh
# The image's entrypoint, installed as `gpt2box`: check the volumes, then run a gpt2box command or any other program.
#
#   docker run gpt2box                   gpt2box --help
#   docker run gpt2box sample            gpt2box sample
#   docker run gpt2box nvidia-smi        nvidia-smi
set -eu

# fail FOUND EXPECTED NEXT EXIT_CODE: print an error in the form of gpt2box/errors.py and exit.
fail() {
    printf 'error: %s\n  expected: %s\n  next: %s\n' "$1" "$2" "$3" >&2
    exit "$4"
}

# is_other_program NAME: true if NAME is a program on the PATH and not a gpt2box command.
# Python knows the commands. It is asked only if a program of that name exists, such as `watch`.
is_other_program() {
    command -v -- "$1" >/dev/null || return 1
    ! python -c 'import sys; from gpt2box.cli.main import cli; sys.exit(sys.argv[1] not in cli.commands)' "$1"
}

# asks_for_help ARGUMENT...: true if the command would only print its help.
asks_for_help() {
    for argument; do
        case $argument in -h | --help) return 0 ;; esac
    done
    return 1
}

# check_volumes: exit with 78 if volumes are mounted for writing but this user cannot write to them.
# Volumes that are mounted read-only or not at all are left to the command, which knows what it writes.
check_volumes() {
    volumes=${GPT2BOX_VOLUMES:-/volumes}
    unwritable=
    while read -r _ folder _ options _; do
        case $folder in "$volumes" | "$volumes"/*) ;; *) continue ;; esac
        case ,$options, in *,ro,*) continue ;; esac
        if [ ! -w "$folder" ] || [ ! -x "$folder" ]; then
            unwritable="$unwritable volumes${folder#"$volumes"}" # compose.yaml's name on the host
            owner=$(stat -c %u:%g "$folder")
        fi
    done </proc/mounts
    [ -n "$unwritable" ] || return 0
    next="on the host: sudo chown -R $(id -u):$(id -g)$unwritable"
    case $owner in 0:*) ;; *) next="$next; or start with --user $owner, who owns it" ;; esac
    fail "not writable:$unwritable" "write permission for uid $(id -u), or a read-only mount (:ro)" "$next" 78
}

_main() {
    trap 'exit 143' TERM # the kernel ignores a signal for which the first process of a container has no handler
    [ $# -gt 0 ] || set -- --help
    case $1 in
    -*) ;; # options of gpt2box itself
    nvidia-smi)
        command -v nvidia-smi >/dev/null ||
            fail 'no nvidia-smi here: the container was started without a GPU' 'a container that sees a GPU' \
                'start it with --gpus all' 3
        exec "$@"
        ;;
    *)
        if is_other_program "$1"; then
            exec "$@"
        fi
        # These write to several volumes: name all that are unwritable at once. Others report what they need themselves,
        # and preflight's report covers the volumes.
        case $1 in train | prepare | fetch) asks_for_help "$@" || check_volumes ;; esac
        ;;
    esac
    exec python -m gpt2box "$@"
}

_main "$@"
