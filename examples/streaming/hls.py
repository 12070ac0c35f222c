#!/usr/bin/python3
"""Writes an upscaled source as HLS and serves it over HTTP.

SOURCE is a file, a camera (/dev/video0), a URI (rtsp, srt, rtmp, http) or 'test'. Segments are MPEG
transport streams, or fragmented MP4 with --segments fmp4. With --once, the playlist keeps all
segments and is complete when the source ends.

    hls.py test                                      # http://localhost:8080/playlist.m3u8
    hls.py rtsp://10.0.0.7/live --folder /srv/hls --port 0       # another server serves the folder
    hls.py film.mp4 --once --folder film --segments fmp4
"""

import functools
import http.server
import tempfile
import threading
from pathlib import Path

import relay
from relay import Gst


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    extensions_map = {
        ".m3u8": "application/vnd.apple.mpegurl",
        ".ts": "video/mp2t",
        ".mp4": "video/mp4",
        ".m4s": "video/mp4",
    }

    def end_headers(self):
        self.send_header("Access-Control-Allow-Origin", "*")
        if not self.path.endswith((".ts", ".m4s")):
            self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_):
        pass


def build(args, folder, has_audio):
    """Returns the pipeline that writes the segments."""
    keep = 0 if args.once else 6
    common = f"target-duration={args.segment} playlist-length={keep} max-files={2 * keep}"
    if args.segments == "fmp4":
        return build_fmp4(args, folder, has_audio, common)
    video = f"{relay.SOURCE.format('video')} ! sink.video"
    audio = f"{relay.SOURCE.format('audio')} ! sink.audio" if has_audio else ""
    # The encoder makes a keyframe every 60 frames without being asked.
    return Gst.parse_launch(
        f"hlssink2 name=sink send-keyframe-requests=false {common} "
        f'location="{folder}/%05d.ts" playlist-location="{folder}/playlist.m3u8" {video} {audio}'
    )


def build_fmp4(args, folder, has_audio, common):
    """Returns the pipeline for fragmented MP4: audio has segments and a playlist of its own."""

    def sink(kind):
        return (
            f'hlscmafsink name={kind}-sink {common} location="{folder}/{kind}%05d.m4s" '
            f'init-location="{folder}/{kind}%05d.mp4" playlist-location="{folder}/{kind}.m3u8"'
        )

    lines = ["#EXTM3U", "#EXT-X-VERSION:6", "#EXT-X-INDEPENDENT-SEGMENTS"]
    stream = f"#EXT-X-STREAM-INF:BANDWIDTH={1000 * (args.bitrate + 200)}"
    video = f"{relay.SOURCE.format('video')} ! h264parse ! video/x-h264,stream-format=avc ! {sink('video')}"
    audio = ""
    if has_audio:
        audio = f"{relay.SOURCE.format('audio')} ! {sink('audio')}"
        lines.append('#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="audio",NAME="audio",DEFAULT=YES,AUTOSELECT=YES,URI="audio.m3u8"')
        stream += ',AUDIO="audio"'
    pipeline = Gst.parse_launch(f"{video} {audio}")
    # The encoder makes a keyframe every 60 frames without being asked.
    pipeline.get_by_name("video-sink").get_by_name("muxer").set_property("send-force-keyunit", False)
    (folder / "playlist.m3u8").write_text("\n".join([*lines, stream, "video.m3u8", ""]))
    return pipeline


def main():
    parser = relay.arguments(__doc__)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--folder", type=Path, help="for playlist and segments (default: a temporary one)")
    parser.add_argument("--segment", type=int, default=4, metavar="S", help="length of a segment (default 4)")
    parser.add_argument("--segments", choices=["ts", "fmp4"], default="ts", help="format of segments (default ts)")
    parser.add_argument("--port", type=int, default=8080, help="TCP port of HTTP, 0 for none (default 8080)")
    args = parser.parse_args()
    if args.segments == "fmp4":
        for element, plugin in (("hlscmafsink", "hlssink3"), ("cmafmux", "fmp4")):
            if not Gst.ElementFactory.find(element):
                relay.fail(
                    f"--segments fmp4 needs {element}, which is not installed: it is in the plugin {plugin} of "
                    "gst-plugins-rs, which Debian does not have; see docs/streaming.md"
                )
    scratch = tempfile.TemporaryDirectory()
    folder = args.folder or Path(scratch.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        relay.fail(f"--folder {folder}: {error.strerror}")
    source = relay.Relay("hls", args.source, args)
    if args.port:
        try:
            handler = functools.partial(Handler, directory=folder)
            server = http.server.ThreadingHTTPServer(("", args.port), handler)
        except OSError as error:
            relay.fail(f"port {args.port}: {error.strerror}; choose another --port")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"http://localhost:{args.port}/playlist.m3u8", flush=True)
    relay.send(source, lambda: build(args, folder.resolve(), source.has_audio))
    relay.run(args, [source])


if __name__ == "__main__":
    main()
