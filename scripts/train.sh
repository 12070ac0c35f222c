#!/usr/bin/env bash
# Trains models one after another, on one core, in runs/: the models for scales up to 2 at detail 0,
# each from its file in models/, and then a dial detail for each, with one teacher. A second run of
# this script continues from the checkpoints.
#
# Usage: scripts/train.sh FOLDER..     (folders with photos and videos)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ $# -gt 0 ]] || fail "name the folders with photos and videos"
mapfile -t data < <(realpath -e "$@")
[[ ${#data[@]} -eq $# ]] || fail "a folder is missing"
cd "$root"
mkdir -p runs
# A copy, because a build may replace the program while it runs. Renamed, because an older copy may
# run, too.
require_rust
cargo build --release --locked --bin tadsr-train
cp "$target/release/tadsr-train" runs/tadsr-train.new
mv runs/tadsr-train.new runs/tadsr-train
failed=()
# train NAME BEGIN [OPTION..]: trains a recipe. The model BEGIN is used if there is one and the run
# is new.
train() {
    local name=$1 begin=()
    [[ -e runs/$name/checkpoint.safetensors || ! -e $2 ]] || begin=(--begin "$2")
    taskset -c "$(($(nproc) - 1))" runs/tadsr-train run "models/recipes/$name.toml" --data "${data[@]}" \
        --out "runs/$name" "${begin[@]}" --threads 1 --save-every 2000 "${@:3}" && return
    # Ctrl-C ends all. After another error, the other trainings still run.
    [[ $? -ne 130 ]] || exit 130
    failed+=("$name")
}
for name in base-x2 small-x2 tiny-x2; do train "$name-plain" "models/$name.safetensors"; done
train tiny-x2-memory models/tiny-x2-memory.safetensors
for name in tiny-x2 small-x2 base-x2; do
    train "$name" "runs/$name-plain/model.safetensors" --teacher runs/teacher-x2
done
[[ ${#failed[@]} -eq 0 ]] || fail "failed: ${failed[*]}; if a recipe has changed, remove the folder of its old run"
