#!/usr/bin/env bash
# Installs the packages of scripts/package.sh in clean chroots of Debian, uses and removes them.
# Needs root. The chroots are below target/.
#
# Usage: scripts/test-package.sh [SUITE..]     (default: bookworm trixie sid)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ $(id -u) -eq 0 ]] || fail "debootstrap and chroot need root"
[[ $# -gt 0 ]] || set -- bookworm trixie sid
packages=("$target"/package/*.deb "$target"/package/*.tar.gz)
[[ -f ${packages[0]} ]] || fail "there is no package; run scripts/package.sh first"
install_packages debootstrap

# Runs in the chroot.
inside() {
    set -euo pipefail
    export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 HOME=/root
    cd /tmp
    trap 'echo "line $LINENO: $BASH_COMMAND" >&2' ERR
    # Prints frames and size of a video.
    frames() {
        timeout 60 gst-launch-1.0 -v filesrc location="$1" ! decodebin ! 'video/x-raw(ANY)' ! \
            fakesink name=end silent=false >log 2>&1
        echo "$(grep -c 'end: last-message = chain' log)" \
            "$(sed -n 's/.*end.GstPad:sink: caps.*width=(int)\([0-9]*\), height=(int)\([0-9]*\).*/\1x\2/p' log)"
    }
    files() { find / -xdev -path /tmp -prune -o -path /proc -prune -o -name '*tadsr*' -print; }

    # Only this package's recommendations, as those of the others are large.
    local recommended
    IFS=', ' read -r -a recommended <<<"$(dpkg-deb -f tadsr.deb Recommends)"
    apt-get -q install -y --no-install-recommends ./tadsr.deb "${recommended[@]}" man-db
    # Not by head, which ends before gst-inspect-1.0 has written all.
    gst-inspect-1.0 --version | sed -n 2p >version
    gst-inspect-1.0 tadsrupscale >/dev/null
    gst-launch-1.0 -q videotestsrc num-buffers=2 ! tadsrupscale @preset=animation ! fakesink
    gst-launch-1.0 -q videotestsrc num-buffers=25 ! video/x-raw,width=160,height=90,framerate=25/1 ! \
        x264enc ! mp4mux ! filesink location=clip.mp4
    gst-launch-1.0 -q filesrc location=clip.mp4 ! decodebin ! videoconvert ! tadsrupscale scale=2 ! \
        x264enc ! mp4mux ! filesink location=pipeline.mp4
    [[ $(frames pipeline.mp4) == "25 320x180" ]]
    timeout 120 tadsr-train upscale clip.mp4 tool.mp4 --scale 3
    [[ $(frames tool.mp4) == "25 480x270" ]]
    local command
    for command in $(tadsr-train --help | sed -n '/^Commands:/,/^Options:/s/^  \([a-z]\+\) .*/-\1/p'); do
        [[ $command == -help ]] || man -w "tadsr-train$command" >/dev/null
    done
    man -w tadsr-train >/dev/null
    test -s /usr/share/bash-completion/completions/tadsr-train.bash
    test -s /usr/share/fish/vendor_completions.d/tadsr-train.fish
    test -s /usr/share/zsh/vendor-completions/_tadsr-train
    test -s /usr/share/doc/tadsr/copyright

    apt-get -q purge -y tadsr
    [[ -z $(files) ]] || { echo "left: $(files)" >&2 && false; }

    tar -xzf tadsr.tar.gz
    tadsr-*/install.sh
    gst-inspect-1.0 tadsrupscale >/dev/null
    /root/.local/bin/tadsr-train info tiny
    tadsr-*/install.sh --uninstall
    tadsr-*/install.sh --prefix /opt/upscaler
    GST_PLUGIN_PATH=/opt/upscaler/lib/gstreamer-1.0 gst-inspect-1.0 tadsrupscale >/dev/null
    tadsr-*/install.sh --prefix /opt/upscaler --uninstall
    [[ -z $(files) && -z $(find /opt/upscaler -type f) ]] || { echo "left: $(files)" >&2 && false; }
    echo complete >>version
}

for suite in "$@"; do
    base=$target/chroot/package-$suite folder=$target/chroot/package-test
    if [[ ! -e $base.complete ]]; then
        say "Installing Debian $suite in $base"
        rm -rf "$base"
        mkdir -p "$base"
        debootstrap --variant=minbase "$suite" "$base" >"$base.log" || fail "see $base.log"
        touch "$base.complete"
    fi
    rm -rf "$folder"
    cp -a "$base" "$folder"
    cp "${packages[0]}" "$folder/tmp/tadsr.deb"
    cp "${packages[1]}" "$folder/tmp/tadsr.tar.gz"
    if ! chroot "$folder" bash -c "$(declare -f inside); inside" >"$base.log" 2>&1 </dev/null; then
        tail -n 20 "$base.log" >&2
        fail "Debian $suite: the package does not pass; its output is in $base.log"
    fi
    [[ $(tail -n 1 "$folder/tmp/version") == complete ]] || fail "Debian $suite: see $base.log"
    say "Debian $suite, $(head -n 1 "$folder/tmp/version"): installed, upscaled, removed"
    rm -rf "$folder"
done
