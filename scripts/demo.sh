#!/usr/bin/env bash
# Upscales a video with the GStreamer element tadsrupscale.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TEXT'
Usage: scripts/demo.sh [INPUT [OUTPUT]] [--scale N]

Installs missing packages (Debian and Ubuntu; Rust is only checked), builds the plugin and upscales
INPUT, any video that GStreamer can decode, to the MP4 file OUTPUT. Writes also a picture with the
extension .png beside OUTPUT. It shows the centre of the middle frame: bicubic interpolation on the
left, tadsrupscale on the right.

  INPUT      video file (default: a rendered clip)
  OUTPUT     MP4 file (default: NAME-xN.mp4 in the current folder; for the rendered clip, in
             target/demo)
  --scale N  factor for width and height, above 1 up to 4 (default 2)
  --help     this text
TEXT
}

parse_arguments() {
    local positional=()
    input='' output='' scale=2
    while [[ $# -gt 0 ]]; do
        case $1 in
            -h | --help) usage && exit 0 ;;
            --scale) [[ $# -gt 1 ]] || fail "--scale needs a number"; scale=$2 && shift ;;
            --scale=*) scale=${1#*=} ;;
            --) shift && positional+=("$@") && break ;;
            -?*) fail "unknown option '$1'; see --help" ;;
            *) positional+=("$1") ;;
        esac
        shift
    done
    [[ ${#positional[@]} -le 2 ]] || fail "one INPUT and one OUTPUT at most; see --help"
    input=${positional[0]-} output=${positional[1]-}
    if [[ ! $scale =~ ^[0-9]+(\.[0-9]+)?$ ]] || awk -v s="$scale" 'BEGIN { exit s > 1 && s <= 4 }'; then
        fail "--scale $scale: a number above 1, up to 4"
    fi
}

# Checks the files before anything is installed or built.
check_files() {
    if [[ -z $input ]]; then
        input=$target/demo/scene.mp4
        mkdir -p "$target/demo"
        : "${output:=$target/demo/scene-x$scale.mp4}"
        rendered=yes
    else
        [[ -e $input ]] || fail "there is no '$input'"
        [[ -f $input && -r $input ]] || fail "'$input' is not a file that can be read"
        local name=${input##*/}
        : "${output:=${name%.*}-x$scale.mp4}"
        rendered=
    fi
    [[ $output == *.mp4 ]] || fail "'$output' does not end in .mp4, the only output format"
    [[ ! $input -ef $output ]] || fail "'$input' is the input and cannot be the output"
    [[ ! -d $output ]] || fail "'$output' is a folder"
    picture=${output%.mp4}.png
    partial=$output.part
    (: >"$partial") 2>/dev/null || fail "'$output' cannot be written"
    scratch=$(mktemp -d)
    trap 'rm -rf -- "$scratch" "$partial"' EXIT
    trap 'exit 130' INT TERM
}

# Renders four seconds of the scene in examples/render_scene.rs, as a small web video.
render_clip() {
    local width=480 height=270
    say "Rendering a clip of 4 seconds, ${width}x$height"
    render_scene $width $height 96 |
        gst-launch-1.0 -q fdsrc ! rawvideoparse format=rgb width=$width height=$height framerate=24/1 ! \
            videoconvert ! video/x-raw,format=I420 ! x264enc pass=qual quantizer=18 ! mp4mux ! \
            filesink location="$input" || fail "the clip could not be made"
}

# has KIND FILE: returns true if the file has a stream of the kind, audio or video, that can be
# decoded. GStreamer does not end with a short file that has none.
has() {
    timeout 20 gst-launch-1.0 filesrc location="$2" ! decodebin ! "$1/x-raw(ANY)" ! fakesink num-buffers=1 \
        >"$scratch/has.log" 2>&1 </dev/null
}

# probe FILE: decodes the first video to its end. Sets frames, width, height, par, interlaced,
# rotated, and half_ms, half the duration in milliseconds.
probe() {
    local log=$scratch/probe.log caps
    if ! has video "$1"; then
        grep -q 'Delayed linking failed' "$scratch/has.log" &&
            fail "'$1' has no video that can be decoded"
        fail "'$1' cannot be decoded: $(first_error "$scratch/has.log")"
    fi
    gst-launch-1.0 -v -t filesrc location="$1" ! decodebin ! 'video/x-raw(ANY)' ! \
        fakesink name=frames silent=false >"$log" 2>&1 </dev/null ||
        fail "'$1' cannot be decoded to its end: $(first_error "$log")"
    frames=$(grep -c 'GstFakeSink:frames: last-message = chain' "$log") || fail "'$1' has no frames"
    # If the size changes, the first one counts.
    caps=$(grep -m 1 'GstFakeSink:frames.GstPad:sink: caps = video/x-raw' "$log")
    field() { sed -n "s|.*[, ]$1=([a-z]*)\([^,;]*\).*|\1|p" <<<"$caps"; }
    width=$(field width) height=$(field height) par=$(field pixel-aspect-ratio)
    half_ms=$(grep 'chain.* pts: [0-9]' "$log" | sed -n '1p;$p' | sed 's/.* pts: \([0-9:.]*\).*/\1/' | awk -F : '
        { first = last; last = 3600 * $1 + 60 * $2 + $3 }
        END { half = int(1000 * (last - first) / 2); print (NR == 2 && half > 0) ? half : 1000 }')
    interlaced=$(field interlace-mode | grep -v progressive) || true
    rotated=$(sed -n 's/^ *image orientation: \(.*\)/\1/p' "$log" | grep -v rotate-0 | head -n 1) || true
}

# Returns the first error in a log of gst-launch-1.0.
first_error() {
    sed -n 's/^ERROR: from element [^ ]*: //p' "$1" | head -n 1
}

# Sets `prepare`, the elements before the upscaler, and `upscale`, which sets the scale. If the
# scale does not give an even size, as 4:2:0 video needs, it sets the nearest even size.
plan() {
    local even
    # shellcheck disable=SC2054 # The comma belongs to the caps.
    prepare=(videoconvert ! video/x-raw,format=I420 !)
    [[ -z $interlaced ]] || prepare+=(deinterlace fields=top !)
    if [[ -n $rotated ]]; then
        prepare+=(videoflip video-direction=auto !)
        [[ $rotated != *90 && $rotated != *270 ]] || read -r width height <<<"$height $width"
    fi
    upscale=(tadsrupscale scale="$scale")
    read -r out_width out_height even < <(awk -v w="$width" -v h="$height" -v s="$scale" 'BEGIN {
        ow = 2 * int(w * s / 2 + 0.5); oh = 2 * int(h * s / 2 + 0.5)
        print ow, oh, (ow == w * s && oh == h * s) ? "yes" : "no" }')
    if [[ $even == no ]]; then
        upscale=(tadsrupscale !
            "video/x-raw,width=$out_width,height=$out_height,pixel-aspect-ratio=${par:-1/1}")
        say "${width}x$height times $scale is not a size in even numbers: ${out_width}x$out_height instead"
    fi
}

run_pipeline() {
    local sound=() began seconds
    if has audio "$input"; then
        sound=(from. ! audio/x-raw ! audioconvert ! audioresample ! avenc_aac !
            queue max-size-time=0 max-size-bytes=0 max-size-buffers=0 ! mux.)
    else
        say "The input has no sound that can be decoded: the output will have none"
    fi
    # shellcheck disable=SC2054 # The comma belongs to the caps.
    local pipeline=(filesrc location="$input" ! decodebin name=from
        from. ! video/x-raw ! queue ! "${prepare[@]}" "${upscale[@]}" !
        progressreport name=upscaled update-freq=5 ! queue !
        x264enc pass=qual quantizer=18 speed-preset=veryfast ! mp4mux name=mux ! filesink location="$partial"
        "${sound[@]}")
    say "" "$(shell_line "${pipeline[@]}")" ""
    began=$EPOCHREALTIME
    gst-launch-1.0 -q "${pipeline[@]}" </dev/null || fail "the pipeline failed; its last error is above"
    seconds=$(awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
    fps=$(awk -v n="$frames" -v s="$seconds" 'BEGIN { printf "%.1f", n / s }')
    speed="$frames frames in $seconds s: $fps frames a second, decoding and encoding included"
}

# Prints the pipeline as a command line with the final name of the output.
shell_line() {
    local word
    for word in "GST_PLUGIN_PATH=$target/release" gst-launch-1.0 "$@"; do
        [[ $word != "location=$partial" ]] || word="location=$output"
        [[ $word =~ ^([A-Za-z0-9_./:=,+@%-]+|!)$ ]] || word=$(printf '%q' "$word")
        printf '%s ' "$word"
    done
}

check_output() {
    local frames_in=$frames
    probe "$partial"
    [[ $frames -eq $frames_in ]] || fail "$frames_in frames went in, $frames came out"
    [[ ${width}x$height == "${out_width}x$out_height" ]] ||
        fail "the output is ${width}x$height, not ${out_width}x$out_height"
    mv -- "$partial" "$output"
}

# Makes a picture from the centre of the middle frame, small enough to fit a screen twice.
make_picture() {
    local frame crop
    # At a rate of one frame for half the clip's length, the second frame is the middle one.
    gst-launch-1.0 -q filesrc location="$input" ! decodebin ! video/x-raw ! queue ! \
        videorate drop-only=true skip-to-first=true ! "video/x-raw,framerate=1000/$half_ms" ! \
        "${prepare[@]}" videoconvert ! video/x-raw,format=RGB ! pngenc ! multifilesink location="$scratch/frame-%d.png" </dev/null
    frame=$scratch/frame-1.png
    [[ -e $frame ]] || frame=$scratch/frame-0.png
    read -r -a crop < <(od -An --endian=big -tu4 -j16 -N8 "$frame" | awk -v s="$scale" '{
        w = $1 < 800 / s ? $1 : int(800 / s); h = $2 < 720 / s ? $2 : int(720 / s)
        print int(($1 - w) / 2), int(($2 - h) / 2), w, h }')
    side_by_side "$frame" "$picture" "$scale" "${crop[@]}"
}

main() {
    parse_arguments "$@"
    check_files
    install_packages "${build_packages[@]}" "${gstreamer_packages[@]}" "${text_packages[@]}"
    require_rust
    build_plugin
    [[ -z $rendered ]] || render_clip
    say "Reading '$input'"
    probe "$input"
    say "$frames frames of ${width}x$height${interlaced:+, $interlaced}${rotated:+, $rotated}"
    plan
    run_pipeline
    check_output
    say "" "$speed" "Video:        $output (${out_width}x$out_height, $frames frames in, $frames frames out)"
    make_picture || fail "the side-by-side picture could not be made"
    say "Side by side: $picture (left bicubic, right tadsrupscale)"
}

main "$@"
