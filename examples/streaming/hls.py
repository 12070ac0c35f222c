#!/usr/bin/python3
"""Writes an upscaled source as HLS and serves it over HTTP.

SOURCE is a file, a camera (/dev/video0), a URI (rtsp, srt, rtmp, http) or 'test'. Segments are MPEG
transport streams. With --once, the playlist keeps all segments and is complete when the source
ends.

    hls.py test                                      # http://localhost:8080/playlist.m3u8
    hls.py rtsp://10.0.0.7/live --folder /srv/hls --port 0       # another server serves the folder
    hls.py film.mp4 --once --folder film
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
    extensions_map = {".m3u8": "application/vnd.apple.mpegurl", ".ts": "video/mp2t"}

    def end_headers(self):
        self.send_header("Access-Control-Allow-Origin", "*")
        if not self.path.endswith(".ts"):
            self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_):
        pass


def build(args, folder, has_audio):
    """Returns the pipeline that writes the segments."""
    keep = 0 if args.once else 6
    video = f"{relay.SOURCE.format('video')} ! sink.video"
    audio = f"{relay.SOURCE.format('audio')} ! sink.audio" if has_audio else ""
    # The encoder makes a keyframe every 60 frames without being asked.
    return Gst.parse_launch(
        f"hlssink2 name=sink send-keyframe-requests=false target-duration={args.segment} "
        f"playlist-length={keep} max-files={2 * keep} "
        f'location="{folder}/%05d.ts" playlist-location="{folder}/playlist.m3u8" {video} {audio}'
    )


def main():
    parser = relay.arguments(__doc__)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--folder", type=Path, help="for playlist and segments (default: a temporary one)")
    parser.add_argument("--segment", type=int, default=4, metavar="S", help="length of a segment (default 4)")
    parser.add_argument("--port", type=int, default=8080, help="TCP port of HTTP, 0 for none (default 8080)")
    args = parser.parse_args()
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
