#!/usr/bin/python3
"""Serves upscaled sources over RTSP.

A SOURCE is a file, a camera (/dev/video0), a URI (rtsp, srt, rtmp, http) or 'test'. Each is served
at /NAME, for any number of clients. While a source is away, new clients get 'not found', and
connected ones wait. AAC audio is copied, other audio is encoded.

    rtsp.py test                                     # rtsp://localhost:8554/upscaled
    rtsp.py door=rtsp://10.0.0.7/live yard=/dev/video0 --upscale 'tadsrupscale scale=1.5'
    rtsp.py 'srt://:9000?mode=listener' --metrics 9100
"""

import re

import gi

import relay

gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, GstRtspServer  # noqa: E402

VIDEO = relay.SOURCE.format("video") + " ! rtph264pay name=pay0 pt=96 config-interval=-1"
AUDIO = relay.SOURCE.format("audio") + " ! rtpmp4gpay name=pay1 pt=97"


def mount(server, path, source):
    """Serves a relay at a path while it plays."""
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_shared(True)

    def on_media(_factory, media):
        output = relay.Output(source, media.get_element())
        media.connect("unprepared", lambda _media: output.close())

    def on_start():
        factory.set_launch(f"( {VIDEO} {AUDIO if source.has_audio else ''} )")
        server.get_mount_points().add_factory(path, factory)

    factory.connect("media-configure", on_media)
    source.on_start = on_start
    source.on_stop = lambda: server.get_mount_points().remove_factory(path)


def main():
    parser = relay.arguments(__doc__)
    parser.add_argument("sources", nargs="+", metavar="[NAME=]SOURCE", help="the default of NAME is 'upscaled'")
    parser.add_argument("--port", type=int, default=8554, help="TCP port (default 8554)")
    args = parser.parse_args()
    server = GstRtspServer.RTSPServer(service=str(args.port))
    relays = {}
    for text in args.sources:
        name, source = re.fullmatch(r"(?:([\w-]+)=)?(.*)", text).groups()
        name = name or "upscaled"
        if name in relays:
            parser.error(f"two sources have the name '{name}': NAME=SOURCE")
        relay.refuse_loop(source, args.port)
        relays[name] = relay.Relay(name, source, args)
        mount(server, f"/{name}", relays[name])
    if server.attach(None) == 0:
        relay.fail(f"port {args.port} is in use; choose another --port")
    for name in relays:
        print(f"rtsp://localhost:{args.port}/{name}", flush=True)
    # Ends the sessions of clients that have vanished.
    GLib.timeout_add_seconds(10, lambda: server.get_session_pool().cleanup() >= 0)
    relay.run(args, list(relays.values()))


if __name__ == "__main__":
    main()
