#!/usr/bin/env bash
# Runs the tests of video files with the GStreamer and the ffmpeg of another version of Debian, in a
# chroot below target/. Needs root.
#
# Usage: scripts/test-chroot.sh [SUITE]     (trixie, sid, ..; default trixie)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
suite=${1:-trixie}
[[ $(id -u) -eq 0 ]] || fail "debootstrap and chroot need root"
install_packages debootstrap
require_rust
cd "$root"

say "Building the tests"
executable=$(cargo test --locked --no-run --test nothing_lost 2>&1 | tee /dev/stderr |
    sed -n 's/.*Executable.*(\(.*\))$/\1/p')
[[ -x $executable ]] || fail "cargo does not report the path of the tests"

folder=$target/chroot/$suite
if [[ ! -e $folder/complete ]]; then
    say "Installing Debian $suite in $folder"
    rm -rf "$folder"
    mkdir -p "$folder"
    debootstrap --variant=minbase "$suite" "$folder" >"$folder.log" || fail "see $folder.log"
    chroot "$folder" env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends \
        "${gstreamer_packages[@]}" "${test_packages[@]}" >>"$folder.log" || fail "see $folder.log"
    touch "$folder/complete"
fi
cp "$executable" "$folder/nothing_lost"
chroot "$folder" gst-launch-1.0 --version | tail -n 2 | head -n 1
chroot "$folder" env HOME=/tmp /nothing_lost
