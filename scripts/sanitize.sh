#!/usr/bin/env bash
# Checks unsafe and concurrent code beyond what the tests see: the unit tests of the engine and of
# the plugin with AddressSanitizer, and all orders of threads in the engine's scheduling with loom.
#
# Usage: scripts/sanitize.sh [address|threads]..     (default: both)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
install_packages "${build_packages[@]}" "${gstreamer_packages[@]}" "${test_packages[@]}"
require_rust
cd "$root"
[[ $# -gt 0 ]] || set -- address threads
for part; do
    case $part in
        address)
            # The sanitizer is an unstable option, which the stable compiler has, too. GStreamer
            # keeps memory until the process ends.
            say "" "== unit tests with AddressSanitizer"
            RUSTC_BOOTSTRAP=1 RUSTFLAGS='-Zsanitizer=address' ASAN_OPTIONS=detect_leaks=0 \
                cargo test --locked --target "$(rustc -vV | sed -n 's/^host: //p')" \
                --target-dir "$target/asan" --no-default-features -p tadsr -p gst-plugin-tadsr --lib
            ;;
        threads)
            say "" "== orders of threads with loom"
            RUSTFLAGS='--cfg loom' cargo test --locked --release --manifest-path tests/loom/Cargo.toml \
                --target-dir "$target/loom"
            ;;
        *) fail "unknown check '$part': 'address' or 'threads'" ;;
    esac
done
