#!/usr/bin/env bash
# Makes a segment of a film on this node, or joins all of them. This is the task of a scheduler. It
# may be repeated: finished segments are kept.
#
# Usage: step.sh IN OUT NUMBER|join SETTINGS..
set -euo pipefail
film=${1:?IN is missing} out=${2:?OUT is missing} step=${3:?NUMBER or join is missing}
shift 3
case $step in
    join) name=join option=(--join) ;;
    *) name="segment $step" option=(--segment "$step") ;;
esac

fail() {
    printf "%s: %s of '%s': %s\n" "$(hostname)" "$name" "$film" "$*" >&2
    exit 1
}

command -v tadsr-train >/dev/null || fail "there is no tadsr-train: install it on this node"
[[ -f $film ]] || fail "the file does not exist here: mount the shared folder on this node"
folder=$(dirname "$out")
[[ -w $folder ]] || fail "'$folder' cannot be written: mount the shared folder on this node"
if [[ -e $out ]]; then
    printf "%s of '%s': '%s' exists\n" "$name" "$film" "$out"
    exit
fi
# A scheduler that kills this script does not leave the program running.
setpriv --pdeathsig KILL tadsr-train upscale "$film" "$out" "$@" "${option[@]}" ||
    fail "ended with status $?; finished segments are kept: remove the cause and start again"
