#!/usr/bin/python3
"""Sends an upscaled source over SRT, as an MPEG transport stream.

SOURCE is a file, a camera (/dev/video0), a URI (rtsp, srt, rtmp, http) or 'test'. By default, any
number of clients connect to this program. AAC audio is copied, other audio is encoded.

    srt.py test                                      # srt://localhost:8890
    srt.py rtsp://10.0.0.7/live --to 'srt://:9000?mode=listener'
    srt.py film.mp4 --once --to srt://relay.example:9000         # calls a listener
"""

from urllib.parse import urlsplit

import relay
from relay import Gst


def main():
    parser = relay.arguments(__doc__)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--to", default="srt://:8890?mode=listener", metavar="URI", help="default %(default)s")
    args = parser.parse_args()
    relay.refuse_loop(args.source, urlsplit(args.to).port)
    source = relay.Relay("srt", args.source, args)

    def build():
        video = f"{relay.SOURCE.format('video')} ! mux."
        audio = f"{relay.SOURCE.format('audio')} ! mux." if source.has_audio else ""
        sink = f'srtsink name=sink uri="{args.to}" wait-for-connection=false'
        pipeline = Gst.parse_launch(f"mpegtsmux name=mux alignment=7 ! {sink} {video} {audio}")
        # A client that connects need not wait for the next keyframe.
        pipeline.get_by_name("sink").connect("caller-added", lambda *_: source.request_keyframe())
        return pipeline

    print(args.to, flush=True)
    relay.send(source, build)
    relay.run(args, [source])


if __name__ == "__main__":
    main()
