#!/usr/bin/env bash
# Prints the segments of films, one per line: IN, OUT and the number of the segment, with tabs
# between them. Films whose OUT exists are skipped.
#
# Usage: tasks.sh FILMS SETTINGS..
#
#     tasks.sh films.tsv --model small
#
# FILMS is a file with a line for each film: IN and OUT with a tab between them. SETTINGS are
# options of 'tadsr-train upscale'.
set -euo pipefail

fail() {
    printf 'tasks.sh: %s\n' "$*" >&2
    exit 1
}

films=${1:?the first argument is a list of films}
shift
[[ -r $films ]] || fail "there is no list of films '$films': write lines 'IN<tab>OUT'"
# Without a name, each machine would choose a model by its speed.
[[ " $* " == *' --model'[\ =]* ]] || fail "name the model, for example: --model small"
command -v tadsr-train >/dev/null || fail "there is no tadsr-train: install it on $(hostname)"
while IFS=$'\t' read -r film out; do
    [[ -n $film ]] || continue
    [[ -n $out ]] || fail "'$film' has no output: write lines 'IN<tab>OUT' into '$films'"
    if [[ -e $out ]]; then
        printf "skipped '%s': '%s' exists\n" "$film" "$out" >&2
        continue
    fi
    segments=$(tadsr-train upscale "$film" "$out" "$@" --list-segments </dev/null) ||
        fail "'$film' cannot be divided: correct '$films' or mount the shared folder"
    while read -r number _; do
        printf '%s\t%s\t%s\n' "$film" "$out" "$number"
    done <<<"$segments"
done <"$films"
