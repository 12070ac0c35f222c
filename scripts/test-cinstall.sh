#!/usr/bin/env bash
# Installs the plugin into a temporary folder with `cargo cinstall`, as docs/get-started.md says,
# and loads it.
#
# Usage: scripts/test-cinstall.sh
#
# Installs cargo-c from crates.io if it is missing.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
install_packages "${build_packages[@]}" "${gstreamer_packages[@]}" libssl-dev
require_rust
cargo cinstall --version >/dev/null 2>&1 || cargo install --locked "cargo-c@$cargo_c"
cd "$root"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
libraries=/usr/lib/$(gcc -print-multiarch)
cargo cinstall --release --locked -p gst-plugin-tadsr --prefix /usr --libdir "$libraries" \
    --destdir "$folder"
expected="$libraries/gstreamer-1.0/libgsttadsr.so
$libraries/pkgconfig/gsttadsr.pc"
found=$(cd "$folder" && find . \( -type f -o -type l \) ! -name '*.a' -printf '/%P\n' | sort)
[[ $found == "$expected" ]] || fail "installed files: $found"
version=$(PKG_CONFIG_PATH=$folder$libraries/pkgconfig pkg-config --modversion gsttadsr)
GST_REGISTRY=$folder/registry GST_PLUGIN_PATH=$folder$libraries/gstreamer-1.0 \
    gst-inspect-1.0 tadsrupscale | grep "Version *$version" || fail "GStreamer does not load the plugin"
say "$found"
