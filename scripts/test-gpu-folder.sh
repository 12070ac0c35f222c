#!/usr/bin/env bash
# Runs the folder of benches/gpu.sh in a bare Debian with nothing but Python, on a stand-in for the
# driver that executes the source of the kernels on the CPU. Needs root.
#
# Usage: scripts/test-gpu-folder.sh
#
# Checks that the programs need no newer C library than that of Ubuntu 22.04, that the step with
# small frames passes, that a device that computes wrong results leads to the steps that find the
# kernel, and that candidates for kernels are compared with their reference.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ $(id -u) -eq 0 ]] || fail "debootstrap and chroot need root"
install_packages "${build_packages[@]}" "${gstreamer_packages[@]}" debootstrap binutils
require_rust
cd "$root"
benches/gpu.sh "$target/gpu"

newest=$(objdump -T "$target/gpu/gpu" "$target/gpu/tadsr-train" | grep -o 'GLIBC_2\.[0-9]*' | sort -Vu | tail -n 1)
[[ $(printf '%s\n' "$newest" GLIBC_2.35 | sort -V | tail -n 1) == GLIBC_2.35 ]] ||
    fail "the programs need $newest"

system=$target/chroot/gpu
if [[ ! -e $system/complete ]]; then
    rm -rf "$system"
    mkdir -p "$system"
    debootstrap --variant=minbase --include=python3-minimal bookworm "$system" >"$system.log" || fail "see $system.log"
    touch "$system/complete"
fi
rm -rf "$system/gpu" "$system/out"
tar -C "$system" -xJf "$target/gpu.tar.xz"

c++ -std=c++17 -O2 -fPIC -shared -ffp-contract=off -Wl,-soname,libcuda.so.1 -static-libstdc++ -static-libgcc \
    -o "$system/usr/lib/libcuda.so.1" src/ops/cuda/host/driver.cpp

# run STEPS [VARIABLE=VALUE]: runs the steps in the chroot. Returns the status of run.sh.
run() {
    rm -rf "$system/out"
    chroot "$system" env OUT=/out BUDGET=3600 PATIENCE=30 STEPS="$1" "${@:2}" /gpu/run.sh
}

# expect LINE..: checks lines of the summary, whose seconds vary.
expect() {
    local line
    for line; do
        grep -q "^$line" "$system/out/summary.txt" || fail "the summary lacks: $line"
    done
}

run 'machine short ptx ceilings eager compile memcheck kernels' && fail "ceilings cannot pass without a device"
expect 'machine: passed' 'short: passed' 'ptx: passed' 'ceilings: failed' 'eager: left out, no PyTorch' \
    'compile: left out, no PyTorch' 'memcheck: left out, no compute-sanitizer' 'kernels: left out, no ncu'
grep -q 'upload, pinned memory' "$system/out/ceilings.txt" || fail "no ceilings of copies"

run 'short bisect memcheck racecheck' TADSR_DRIVER_DEFECTIVE=1 && fail "wrong results pass"
expect 'short: failed' 'bisect: failed' 'memcheck: left out' 'racecheck: left out'
grep -q 'kernel 1, tadsr_conv16_of4: .* values differ, first at column' "$system/out/bisect.txt" ||
    fail "the wrong kernel was not found"

# Without times, which take hours there.
candidates() { chroot "$system" env "$@" /gpu/gpu --candidates /gpu >"$system/candidates.txt"; }
candidates || fail "a candidate is wrong: $(cat "$system/candidates.txt")"
for line in 'row16, 261x23: a difference' 'row32, 261x23: a difference' 'fused16, 261x23: a difference' \
    'group64: not on this device'; do
    grep -q "^$line" "$system/candidates.txt" || fail "candidates lack: $line"
done
candidates TADSR_DRIVER_DEFECTIVE=1 && fail "a wrong kernel passes"
grep -q '^tadsr_conv16, .* values differ, first at column' "$system/candidates.txt" || fail "a wrong kernel was not found"
say "The folder works on a bare system."
