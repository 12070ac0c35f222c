#!/usr/bin/env bash
# Runs the fuzz targets one after another with AddressSanitizer, from the inputs in fuzz/corpus.
#
# Usage: scripts/fuzz.sh [SECONDS [TARGET..]]     (default: 300 seconds, all targets)
#
# An input that fails is written to fuzz/artifacts/TARGET, and the script ends with an error. New
# inputs are written to target/fuzz.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
install_packages "${build_packages[@]}" "${gstreamer_packages[@]}"
require_rust
cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
cd "$root"
seconds=${1-300}
shift || true
[[ $# -gt 0 ]] || set -- model checkpoint recipe frame element
# The sanitizer is an unstable option, which the stable compiler has, too.
export RUSTC_BOOTSTRAP=1
failed=()
for name in "$@"; do
    say "" "== $name"
    found=$target/fuzz/$name
    mkdir -p "$found"
    # GStreamer keeps memory until the process ends.
    ASAN_OPTIONS=detect_leaks=0 cargo fuzz run --target-dir "$target/fuzz-build" "$name" \
        "$found" "fuzz/corpus/$name" -- -max_total_time="$seconds" -timeout=60 -rss_limit_mb=4096 \
        -print_final_stats=1 || failed+=("$name")
done
[[ ${#failed[@]} -eq 0 ]] || fail "failed: ${failed[*]}; the inputs are in fuzz/artifacts"
