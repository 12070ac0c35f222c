#!/usr/bin/env bash
# Upscales films on several machines with GNU parallel over ssh, one segment at a time on each.
#
# Usage: parallel.sh FILMS NODES SETTINGS..
#
#     parallel.sh films.tsv node1,node2,: --model small
#
# NODES are those of --sshlogin; ':' is this machine. tasks.sh describes FILMS and SETTINGS. All
# nodes need tadsr-train in PATH, and this folder and the films at the same paths.
set -euo pipefail

fail() {
    printf 'parallel.sh: %s\n' "$*" >&2
    exit 1
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
films=${1:?the first argument is a list of films} nodes=${2:?the second argument is a list of nodes}
shift 2
command -v parallel >/dev/null || fail "there is no GNU parallel: install it on this machine"
tasks=$(mktemp)
trap 'rm -f "$tasks"' EXIT
"$here/tasks.sh" "$films" "$@" >"$tasks"

# Quoted for the shells of the nodes.
folder=${PWD@Q} step=${here@Q}/step.sh settings=${*@Q}
check="cd $folder && ls $step && command -v tadsr-train"
parallel --sshlogin "$nodes" --nonall --tag "$check" >/dev/null ||
    fail "not all nodes can work: mount '$PWD' and '$here' there and install tadsr-train"
status=0
# A task that fails is tried on another node.
parallel --sshlogin "$nodes" --jobs 1 --retries 3 --colsep '\t' --arg-file "$tasks" \
    "cd $folder && $step {1} {2} {3} $settings" || status=1
while IFS=$'\t' read -r film out; do
    [[ -z $film ]] || "$here/step.sh" "$film" "$out" join "$@" || status=1
done <"$films"
exit "$status"
