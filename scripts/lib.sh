# shellcheck shell=bash disable=SC2034
# Functions and package lists that the scripts in this folder share. This file is sourced, not run.

# Makes the format of numbers and messages independent of the user's locale.
export LC_ALL=C.UTF-8

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=$(cd "$root" && realpath -m "${CARGO_TARGET_DIR:-target}")

build_packages=(
    build-essential ca-certificates pkg-config libgstreamer1.0-dev libgstreamer-plugins-base1.0-dev
)
gstreamer_packages=(
    gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good
    gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly gstreamer1.0-libav
)
# Text in pictures: labels of side-by-side pictures, and synthetic training pictures.
text_packages=(gstreamer1.0-x fonts-dejavu-core)
# Independent implementation that makes and measures the video files of tests.
test_packages=(ffmpeg)
# mdBook from PyPI, and the page that is written from the plugin.
docs_packages=(python3-venv python3-gi gir1.2-gstreamer-1.0)
# Servers in examples/streaming and their tests.
streaming_packages=(
    python3-gi gir1.2-gst-rtsp-server-1.0 gir1.2-gst-plugins-base-1.0 gir1.2-gst-plugins-bad-1.0
    gstreamer1.0-nice python3-prometheus-client python3-pytest chromium nodejs
)
# Schedulers of examples/cluster and their tests.
cluster_packages=(
    parallel openssh-client openssh-server slurm-client slurmctld slurmd munge procps python3-venv
)
cluster_modules=(ray==2.60.0 kubernetes-validate==1.37.0)
# The newest that Rust 1.95 builds.
cargo_c=0.10.24
# Drives Chromium in tests.
playwright='playwright-core@1.65.1'

# Prints each argument on its own line.
say() { printf '%s\n' "$@"; }

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# Installs missing packages among the arguments, as root or with sudo.
install_packages() {
    if ! command -v apt-get dpkg-query >/dev/null; then
        say "No apt-get here: assuming that the equivalents of these are installed: $*"
        return
    fi
    local package missing=() as_root=()
    for package in "$@"; do
        case $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) in
            'install ok installed') ;;
            *) missing+=("$package") ;;
        esac
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    if [[ $(id -u) -ne 0 ]]; then
        command -v sudo >/dev/null ||
            fail "packages and sudo are missing; as root: apt-get install ${missing[*]}"
        as_root=(sudo)
    fi
    say "Installing ${missing[*]}"
    local log apt
    log=$(mktemp)
    apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300)
    # An unreachable source may not be the one with the packages.
    "${apt[@]}" update >"$log" 2>&1 </dev/null || true
    if ! "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >>"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        fail "apt-get could not install ${missing[*]}; its output is in $log"
    fi
    rm -f "$log"
}

# Checks that cargo exists and is new enough. The user installs Rust.
require_rust() {
    local need have
    need=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    # shellcheck disable=SC1091
    [[ -n $(command -v cargo) || ! -r ${CARGO_HOME:-$HOME/.cargo}/env ]] || . "${CARGO_HOME:-$HOME/.cargo}/env"
    command -v cargo >/dev/null || fail "Rust $need or newer is needed; install it with
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh
and run this again (https://rustup.rs)"
    have=$(cd "$root" && cargo --version | cut -d ' ' -f 2) || fail "'cargo --version' does not work"
    [[ $(printf '%s\n' "$need" "${have%%-*}" | sort -V | head -n 1) == "$need" ]] ||
        fail "Rust $need or newer is needed, this is $have; 'rustup update stable' brings it up to date"
}

# Builds the plugin in release mode and adds it to GStreamer's path.
build_plugin() {
    say "Building the plugin (the first time takes some minutes)"
    (cd "$root" && cargo build --release --locked -p gst-plugin-tadsr) || fail "the plugin does not build"
    export GST_PLUGIN_PATH=$target/release${GST_PLUGIN_PATH:+:$GST_PLUGIN_PATH}
    gst-inspect-1.0 tadsrupscale >/dev/null 2>&1 || fail "GStreamer does not load $target/release/libgsttadsr.so; see
    GST_PLUGIN_PATH=$target/release gst-inspect-1.0 tadsrupscale"
}

# render_scene WIDTH HEIGHT FRAMES: writes the scene of examples/render_scene.rs as raw RGB to
# standard output. Needs only Rust's standard library.
render_scene() {
    mkdir -p "$target/demo"
    rustc -O --edition 2024 -o "$target/demo/render_scene" "$root/examples/render_scene.rs" &&
        "$target/demo/render_scene" "$@"
}

# side_by_side FRAME.png OUT.png SCALE LEFT TOP WIDTH HEIGHT: upscales a part of the frame, by
# bicubic interpolation on the left and by the network on the right.
side_by_side() {
    local frame=$1 out=$2 scale=$3 left=$4 top=$5 width=$6 height=$7 full_width full_height large
    read -r full_width full_height < <(od -An --endian=big -tu4 -j16 -N8 "$frame")
    large=$(awk -v w="$width" -v h="$height" -v s="$scale" \
        'BEGIN { printf "width=%d,height=%d", w * s + 0.5, h * s + 0.5 }')
    local caps=video/x-raw,$large,pixel-aspect-ratio=1/1
    local label=(valignment=bottom halignment=left shaded-background=true auto-resize=false
        "font-desc=Sans Bold 13")
    gst-launch-1.0 -q filesrc location="$frame" ! pngdec ! imagefreeze num-buffers=1 ! videoconvert ! \
        video/x-raw,format=RGB ! videocrop left="$left" top="$top" \
        right=$((full_width - left - width)) bottom=$((full_height - top - height)) ! tee name=part \
        part. ! queue ! tadsrupscale strength=0 ! "$caps" ! textoverlay text=bicubic "${label[@]}" ! both.sink_0 \
        part. ! queue ! tadsrupscale model=tiny ! "$caps" ! textoverlay text=tadsrupscale "${label[@]}" ! both.sink_1 \
        compositor name=both sink_1::xpos="$(awk -v w="$width" -v s="$scale" 'BEGIN { printf "%d", w * s + 0.5 }')" ! \
        videoconvert ! pngenc snapshot=true ! filesink location="$out"
}
