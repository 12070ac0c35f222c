#!/usr/bin/env bash
# Upscales films on a Slurm cluster: an array job with a task for each segment of a film, and a job
# that joins them. Waits for all films.
#
# Usage: slurm.sh FILMS SETTINGS..
#
#     SBATCH_PARTITION=cpu slurm.sh films.tsv --model small
#
# CPUS_PER_TASK is 4 by default. tasks.sh describes FILMS and SETTINGS. The jobs write their logs to
# the current folder. All nodes need tadsr-train in PATH, and this folder and the films at the same
# paths.
set -euo pipefail

fail() {
    printf 'slurm.sh: %s\n' "$*" >&2
    exit 1
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v sbatch >/dev/null || fail "there is no sbatch: run this where Slurm is installed"
tasks=$("$here/tasks.sh" "$@")
shift
options=(--parsable --cpus-per-task="${CPUS_PER_TASK:-4}")
declare -A films counts arrays joins
while IFS=$'\t' read -r film out number; do
    [[ -z $film ]] || films[$out]=$film counts[$out]=$number
done <<<"$tasks"

for out in "${!films[@]}"; do
    arguments=("$here/slurm-step.sh" "$here" "${films[$out]}" "$out" "$@")
    array=$(sbatch "${options[@]}" --array="1-${counts[$out]}" "${arguments[@]}")
    # With several clusters, the name of the cluster follows.
    array=${array%%;*}
    # The join also runs after failures: its log lists the missing segments.
    sbatch "${options[@]}" --wait --dependency="afterany:$array" --output="tadsr-$array-join.log" \
        "${arguments[@]}" >/dev/null &
    joins[$out]=$! arrays[$out]=$array
    echo "'$out': segments 1 to ${counts[$out]} are the array job $array"
done
status=0
for out in "${!joins[@]}"; do
    wait "${joins[$out]}" && continue
    status=1
    echo "slurm.sh: '$out' is not complete: see tadsr-${arrays[$out]}-join.log" >&2
done
[[ $status -eq 0 ]] || fail "remove the cause and run the same command again"
