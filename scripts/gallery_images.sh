#!/usr/bin/env bash
# Makes the pictures of docs/gallery.md: parts of a rendered scene, a photo and a frame of a video,
# upscaled by bicubic interpolation and by the bundled model small.
#
# Usage: scripts/gallery_images.sh PHOTO VIDEO
#
# docs/gallery.md names the photo and the video. GST_PLUGIN_PATH selects the folder of the plugin.
# Otherwise the script builds it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ $# -eq 2 && -f $1 && -f $2 ]] || fail "two files are needed: PHOTO VIDEO, see docs/gallery.md"

install_packages "${build_packages[@]}" "${gstreamer_packages[@]}" "${test_packages[@]}"
require_rust
[[ -n ${GST_PLUGIN_PATH-} ]] || build_plugin
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
out=$root/docs/images/gallery
mkdir -p "$out"
convert=(ffmpeg -nostdin -y -v error)

# pair NAME SCALE LEFT TOP WIDTH HEIGHT: upscales a part of $scratch/NAME.png both ways.
pair() {
    local name=$1 scale=$2 left=$3 top=$4 width=$5 height=$6 strength
    "${convert[@]}" -i "$scratch/$name.png" -vf "crop=$width:$height:$left:$top" "$scratch/part.png"
    for strength in 0 1; do
        gst-launch-1.0 -q filesrc location="$scratch/part.png" ! pngdec ! videoconvert ! video/x-raw,format=RGB ! \
            tadsrupscale model=small scale="$scale" strength=$strength ! videoconvert ! \
            webpenc quality=84 speed=6 ! filesink location="$out/$name-$strength.webp"
    done
}

# The part with small letters, blinds and whiskers.
render_scene 480 270 1 |
    "${convert[@]}" -f rawvideo -pix_fmt rgb24 -s 480x270 -i - "$scratch/scene.png"
pair scene 2 10 0 360 200
"${convert[@]}" -i "$1" -vf scale=640:-2:flags=area "$scratch/photo.png"
pair photo 4 150 170 180 100
"${convert[@]}" -ss 1 -i "$2" -frames:v 1 "$scratch/video.png"
pair video 2 60 60 360 200
du -cb "$out"/*.webp
