#!/usr/bin/env bash
# Trains models one after another, on one core, in runs/. Each begins with its file in models/, if it
# has one. A second run of this script continues from the checkpoints.
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
for name in base-x2 tiny-x2-memory small-x2 tiny-x2; do
    begin=()
    model=models/$name.safetensors
    [[ -e runs/$name/checkpoint.safetensors || ! -e $model ]] || begin=(--begin "$model")
    taskset -c "$(($(nproc) - 1))" runs/tadsr-train run "models/recipes/$name.toml" --data "${data[@]}" \
        --out "runs/$name" "${begin[@]}" --threads 1 --save-every 2000 && continue
    # Ctrl-C ends all. After another error, the other trainings still run.
    [[ $? -ne 130 ]] || exit 130
    failed+=("$name")
done
[[ ${#failed[@]} -eq 0 ]] || fail "failed: ${failed[*]}; if a recipe has changed, remove the folder of its old run"
