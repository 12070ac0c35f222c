#!/usr/bin/python3
"""Serves an upscaled file or test pattern over RTSP.

    examples/rtsp_server.py [FILE] [--port 8554] [--upscale 'tadsrupscale scale=2']

Then play rtsp://localhost:8554/upscaled. All clients share one stream. Requires the Debian packages
python3-gi, gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-ugly and gstreamer1.0-libav, and the
plugin installed or on GST_PLUGIN_PATH.
"""

import argparse
from pathlib import Path

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="video to serve (default: a live test pattern)")
    parser.add_argument("--port", default="8554", help="TCP port (default 8554)")
    parser.add_argument("--upscale", default="tadsrupscale scale=2", help="element with its properties")
    args = parser.parse_args()
    if args.file and not args.file.is_file():
        parser.error(f"'{args.file}' is not a file")

    Gst.init(None)
    if Gst.ElementFactory.find("tadsrupscale") is None:
        parser.error("tadsrupscale is missing: install the plugin or set GST_PLUGIN_PATH")
    source = "videotestsrc is-live=true ! video/x-raw,width=640,height=360,framerate=25/1"
    if args.file:
        source = f'filesrc location="{args.file.resolve()}" ! decodebin ! videoconvert'
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(
        f"( {source} ! {args.upscale} ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=50 ! "
        "rtph264pay name=pay0 pt=96 )"
    )
    factory.set_shared(True)
    server = GstRtspServer.RTSPServer(service=args.port)
    server.get_mount_points().add_factory("/upscaled", factory)
    if server.attach(None) == 0:
        parser.error(f"port {args.port} is not available")
    print(f"rtsp://localhost:{args.port}/upscaled", flush=True)
    try:
        GLib.MainLoop().run()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
