#!/usr/bin/env bash
# Speed, quality and memory of tadsrupscale in real pipelines on two cores, compared with other
# upscalers.
#
# Usage: benches/pipeline.sh [CLIP]
#
# CLIP is a video of 1280x720 or more, by default a rendered scene. It is encoded at 640x360 (H.264)
# and upscaled to 1280x720 again. Everything runs on cores 0 and 1. Intermediate files are in
# target/pipeline.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$PWD/target/pipeline
clip=${1-}
if [[ -z $clip ]]; then
    clip=$work/scene.mp4
    if [[ ! -s $clip ]]; then
        mkdir -p "$work"
        cargo run --quiet --release --example render_scene -- 1280 720 150 >"$work/scene.rgb"
        gst-launch-1.0 -q filesrc location="$work/scene.rgb" ! \
            rawvideoparse format=rgb width=1280 height=720 framerate=24/1 ! videoconvert ! video/x-raw,format=I420 ! \
            x264enc pass=quant quantizer=4 ! h264parse ! mp4mux ! filesink location="$work/part.mp4"
        mv "$work/part.mp4" "$clip"
        rm "$work/scene.rgb"
    fi
fi
clip=$(realpath "$clip")
# Files encoded from another clip must not be reused.
work=$work/$(basename "$clip" | tr -c 'A-Za-z0-9\n' _)
mkdir -p "$work"
taskset -c 0,1 cargo bench --quiet -p gst-plugin-tadsr --bench pipeline -- "$clip" "$work"
