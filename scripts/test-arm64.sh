#!/usr/bin/env bash
# Runs unit tests of the library on emulated AArch64 processors: one with all features of the
# emulator, one with NEON only, one with dot products as well, and one on which TADSR_CPU=portable
# selects the portable kernels in whole networks (tests of kernels run every variant in any case).
# Needs root, and Rust to fetch the crates. The compiler and the emulator are those of Debian sid,
# in a chroot below target/.
#
# Usage: scripts/test-arm64.sh [FILTER..]     (parts of the names of tests)
#
# The default are all tests of kernels and frames, and the fast ones of engines. Those of whole
# frames take more than ten minutes each in the emulator:
# scripts/test-arm64.sh engine::lite::cpu::tests
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ $# -gt 0 ]] || set -- kernels:: frame:: upscaler:: engine::noise engine::resshift \
    engine::lite::cpu::{memory,program,wavefront}
filter=("$@")
[[ $(id -u) -eq 0 ]] || fail "debootstrap, chroot and mount need root"
install_packages debootstrap
require_rust
cd "$root"
folder=$target/chroot/arm64
machine=aarch64-unknown-linux-gnu

if [[ ! -e $folder.complete ]]; then
    say "Installing Debian sid in $folder"
    rm -rf "$folder"
    mkdir -p "$folder"
    debootstrap --variant=minbase sid "$folder" >"$folder.log" || fail "see $folder.log"
    # A mirror may be behind, and its lists out of date.
    chroot "$folder" bash -c '
        set -e
        dpkg --add-architecture arm64
        apt-get -q -o Acquire::Check-Valid-Until=false update
        DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends cargo \
            rust-clippy gcc libc6-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross \
            libstd-rust-dev:arm64 qemu-user' >>"$folder.log" 2>&1 || fail "see $folder.log"
    touch "$folder.complete"
fi
cargo fetch --locked --target "$machine"
mkdir -p "$folder/tadsr" "$folder/cargo/registry" "$target/arm64"

# Runs a command in the chroot, in the source folder. The mounts end with it.
# shellcheck disable=SC2016
inside() {
    unshare --mount bash -c '
        set -e
        mount --make-rprivate /
        mount --bind "$1" "$0/tadsr"
        mount --bind "$2" "$0/cargo/registry"
        mount --bind "$3" "$0/mnt"
        mount -t proc proc "$0/proc"
        mount --bind /dev "$0/dev"
        exec chroot "$0" env -C /tadsr "${@:4}"' \
        "$folder" "$root" "${CARGO_HOME:-$HOME/.cargo}/registry" "$target/arm64" \
        env -i PATH=/usr/bin:/bin HOME=/tmp LC_ALL=C.UTF-8 CARGO_HOME=/cargo CARGO_TARGET_DIR=/mnt \
        CARGO_NET_OFFLINE=true CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=0 \
        CARGO_PROFILE_DEV_OPT_LEVEL=2 \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
        "$@"
}

tests=(--locked -p tadsr --lib --no-default-features --target "$machine")
say "" "== lints: cargo clippy ${tests[*]}"
inside cargo clippy "${tests[@]}" --tests -- -D warnings

# Prints the features that kernels use.
cat >"$target/arm64/features.rs" <<'END'
fn main() {
    use std::arch::is_aarch64_feature_detected as has;
    println!("neon {} dotprod {} i8mm {} bf16 {}", has!("neon"), has!("dotprod"), has!("i8mm"), has!("bf16"));
}
END
inside rustc --target "$machine" -C linker=aarch64-linux-gnu-gcc -o /mnt/features /mnt/features.rs

# check CPU FEATURES [VARIABLE=VALUE]: runs the tests on a processor that has the features.
check() {
    local runner="qemu-aarch64 -cpu $1" features
    # shellcheck disable=SC2086
    features=$(inside $runner /mnt/features)
    say "" "== $runner ($features) ${3-}: cargo test ${tests[*]} ${filter[*]}"
    [[ $features == "$2" ]] || fail "the processor should have: $2"
    inside env CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$runner" ${3+"$3"} \
        cargo test "${tests[@]}" -- "${filter[@]}"
}

check max 'neon true dotprod true i8mm true bf16 true'
check cortex-a53 'neon true dotprod false i8mm false bf16 false'
check neoverse-n1 'neon true dotprod true i8mm false bf16 false'
check max 'neon true dotprod true i8mm true bf16 true' TADSR_CPU=portable
say "" "The tests passed on every emulated processor."
