#!/usr/bin/env bash
# Called by meson: builds a package in release mode, copies the file with the name of OUTPUT to
# OUTPUT, and writes its dependencies to DEPFILE.
#
# Usage: meson-build.sh CARGO OUTPUT DEPFILE PACKAGE [ARGUMENTS OF CARGO]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cargo=$1 output=$(realpath -m "$2") depfile=$3 package=$4 name=$2
shift 4

require_rust
(cd "$root" && "$cargo" build --release --locked -p "$package" "$@")
file=$(basename "$output")
cp -- "$target/release/$file" "$output"
# Cargo's list starts with the file's path. Ninja expects its own name for it.
sed "s|^[^:]*${file%.so}[^:]*:|$name:|" "$target/release/${file%.so}.d" >"$depfile"
