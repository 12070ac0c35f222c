#!/usr/bin/env bash
# Called by meson: builds the plugin in release mode, copies it to OUTPUT and writes its
# dependencies to DEPFILE.
#
# Usage: meson-plugin.sh CARGO OUTPUT DEPFILE [ARGUMENTS OF CARGO]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cargo=$1 output=$(realpath -m "$2") depfile=$3 name=$2
shift 3

require_rust
(cd "$root" && "$cargo" build --release --locked -p gst-plugin-tadsr "$@")
cp -- "$target/release/libgsttadsr.so" "$output"
# Cargo's list starts with the library's path. Ninja expects its own name for it.
sed "s|^.*libgsttadsr\.[a-z]*:|$name:|" "$target/release/libgsttadsr.d" >"$depfile"
