#!/usr/bin/env bash
# Speed, quality and memory of tadsrupscale in real pipelines on two cores, beside other upscalers.
#
# Usage: benches/pipeline.sh [CLIP]
#
# CLIP is a video of 1280x720 or more; without it the project's rendered scene is taken. It is encoded at 640x360 (H.264)
# and upscaled to 1280x720 again. With ffmpeg installed, its scalers are measured on the same file. Everything runs on cores
# 0 and 1. What is made lies in target/pipeline.
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
# What was encoded of another clip is of no use.
work=$work/$(basename "$clip" | tr -c 'A-Za-z0-9\n' _)
mkdir -p "$work"
taskset -c 0,1 cargo bench --quiet -p gst-plugin-tadsr --bench pipeline -- "$clip" "$work"

command -v ffmpeg >/dev/null || { echo "ffmpeg is not installed: its scalers are left out"; exit 0; }
echo
ffmpeg -version | sed -n 1p | cut -d' ' -f1-3
truth=$work/truth.mkv
gst-launch-1.0 -q filesrc location="$clip" ! decodebin ! videoconvert ! videoscale method=lanczos ! \
    video/x-raw,format=I420,width=1280,height=720 ! x264enc pass=quant quantizer=0 ! h264parse ! matroskamux ! \
    filesink location="$truth"
# measure NAME FILTER [OPTION...]: frames a second and PSNR-Y of a filter.
measure() {
    local name=$1 filter=$2 out
    shift 2
    if ! out=$(taskset -c 0,1 ffmpeg -v info -hide_banner -benchmark -stats "$@" -threads 2 -i "$work/640x360.mp4" -vf "$filter" \
        -filter_threads 2 -f null - 2>&1); then
        echo "$name: $(tail -n 1 <<<"$out")"
        return
    fi
    local frames seconds psnr
    frames=$(grep -oE 'frame= *[0-9]+' <<<"$out" | tail -n 1 | grep -oE '[0-9]+')
    seconds=$(grep -oE 'rtime=[0-9.]+' <<<"$out" | cut -d= -f2)
    psnr=$(ffmpeg -v info "$@" -i "$work/640x360.mp4" -i "$truth" -lavfi "[0:v]$filter,format=yuv420p[a];[a][1:v]psnr" \
        -f null - 2>&1 | grep -oE 'PSNR y:[0-9.]+' | cut -d: -f2)
    awk -v n="$name" -v f="$frames" -v s="$seconds" -v p="$psnr" 'BEGIN { printf "%-52s %7.1f %8.3f\n", n, f / s, p }'
}
measure "ffmpeg scale=flags=bicubic" scale=1280:720:flags=bicubic
measure "ffmpeg scale=flags=lanczos" scale=1280:720:flags=lanczos
measure "ffmpeg zscale=filter=lanczos" zscale=1280:720:filter=lanczos
measure "ffmpeg libplacebo (ewa_lanczos, Vulkan on the CPU)" \
    "format=yuv420p,hwupload,libplacebo=w=1280:h=720:upscaler=ewa_lanczos,hwdownload,format=yuv420p" -init_hw_device vulkan
