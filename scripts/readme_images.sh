#!/usr/bin/env bash
# Makes the pictures in docs/images: a frame of the rendered scene, upscaled by the bundled model.
#
# Usage: scripts/readme_images.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install_packages "${build_packages[@]}" "${gstreamer_packages[@]}" "${text_packages[@]}"
require_rust
build_plugin

scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
render_scene 480 270 1 | gst-launch-1.0 -q fdsrc ! \
    rawvideoparse format=rgb width=480 height=270 framerate=24/1 ! videoconvert ! pngenc ! \
    filesink location="$scratch/frame.png"
mkdir -p "$root/docs/images"
# The part with small letters, blinds, whiskers and grooves. Twice its width is that of a page.
side_by_side "$scratch/frame.png" "$root/docs/images/before_after.png" 2 150 0 220 160
say "$root/docs/images/before_after.png"
