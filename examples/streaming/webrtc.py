#!/usr/bin/python3
"""Shows an upscaled source in browsers, over WebRTC.

SOURCE is a file, a camera (/dev/video0), a URI (rtsp, srt, rtmp, http) or 'test'. The source is
encoded once for all browsers. Opus audio is copied, other audio is encoded.

    webrtc.py test                                   # open http://localhost:8080
    webrtc.py rtsp://10.0.0.7/live --stun stun://stun.example:3478
    curl -X POST http://localhost:8080/offer         # for other players, see docs/streaming.md
"""

import http.server
import json
import secrets
import sys
import threading
from pathlib import Path

import gi

import relay

gi.require_version("GstSdp", "1.0")
gi.require_version("GstWebRTC", "1.0")
from gi.repository import GLib, Gst, GstSdp, GstWebRTC  # noqa: E402

VIDEO = (
    relay.SOURCE.format("video") + " ! rtph264pay config-interval=-1 aggregate-mode=zero-latency ! "
    "application/x-rtp,media=video,encoding-name=H264,payload=96 ! peer."
)
AUDIO = (
    relay.SOURCE.format("audio") + " ! rtpopuspay ! application/x-rtp,media=audio,encoding-name=OPUS,payload=97 ! peer."
)
# The profile that all browsers decode.
PROFILE = "constrained-baseline"
FILES = {"/": "webrtc.html", "/webrtc.js": "webrtc.js"}


class Peers:
    """Connections to browsers by their numbers."""

    def __init__(self, args, source):
        self.args, self.source, self.all = args, source, {}

    def offer(self):
        """Opens a connection and returns its number and its description with all addresses."""
        id, ready = secrets.token_hex(8), threading.Event()
        stun = f"stun-server={self.args.stun}" if self.args.stun else ""
        audio = AUDIO if self.source.has_audio else ""
        pipeline = Gst.parse_launch(f"webrtcbin name=peer bundle-policy=max-bundle {stun} {VIDEO} {audio}")
        peer = pipeline.get_by_name("peer")

        def on_offer(promise):
            # The reply owns the offer.
            reply = promise.get_reply()
            peer.emit("set-local-description", reply.get_value("offer"), Gst.Promise.new())

        def on_gathering(*_):
            if peer.get_property("ice-gathering-state") == GstWebRTC.WebRTCICEGatheringState.COMPLETE:
                ready.set()

        def on_state(*_):
            state = peer.get_property("connection-state")
            if state in (
                GstWebRTC.WebRTCPeerConnectionState.DISCONNECTED,
                GstWebRTC.WebRTCPeerConnectionState.FAILED,
                GstWebRTC.WebRTCPeerConnectionState.CLOSED,
            ):
                GLib.idle_add(self.close, id)
            elif state == GstWebRTC.WebRTCPeerConnectionState.CONNECTED:
                self.source.request_keyframe()

        # Called when all streams have their caps.
        def on_negotiation(_):
            for index in range(1 + self.source.has_audio):
                sender = peer.emit("get-transceiver", index)
                sender.set_property("direction", GstWebRTC.WebRTCRTPTransceiverDirection.SENDONLY)
            peer.emit("create-offer", None, Gst.Promise.new_with_change_func(on_offer))

        peer.connect("on-negotiation-needed", on_negotiation)
        peer.connect("notify::ice-gathering-state", on_gathering)
        peer.connect("notify::connection-state", on_state)
        self.all[id] = relay.Pipeline(self.source, pipeline, lambda text: self.close(id, text))
        GLib.timeout_add_seconds(30, self.close_unanswered, id)
        if not ready.wait(20):
            GLib.idle_add(self.close, id)
            raise TimeoutError("the source delivers no video")
        return {"id": id, "sdp": peer.get_property("local-description").sdp.as_text()}

    def answer(self, id, sdp):
        result, message = GstSdp.SDPMessage.new_from_text(sdp)
        if result != GstSdp.SDPResult.OK or message.medias_len() == 0:
            raise ValueError("not a session description")
        answer = GstWebRTC.WebRTCSessionDescription.new(GstWebRTC.WebRTCSDPType.ANSWER, message)
        self.all[id].pipeline.get_by_name("peer").emit("set-remote-description", answer, Gst.Promise.new())

    def close_unanswered(self, id):
        output = self.all.get(id)
        if output and not output.pipeline.get_by_name("peer").get_property("remote-description"):
            self.close(id)
        return GLib.SOURCE_REMOVE

    def close(self, id, text=None):
        output = self.all.pop(id, None)
        if output:
            if text:
                relay.log(self.source.name, text)
            output.started = False
            output.close()
        return GLib.SOURCE_REMOVE


def handler(peers):
    class Handler(http.server.BaseHTTPRequestHandler):
        files = FILES

        def reply(self, status, text, kind="text/plain"):
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            if self.path in self.files:
                file = Path(__file__).with_name(self.files[self.path])
                self.reply(200, file.read_text(), "text/javascript" if file.suffix == ".js" else "text/html")
            else:
                self.reply(404, "not found\n")

        def body(self):
            length = self.headers.get("Content-Length") or "0"
            if not length.isdecimal() or int(length) > 1 << 20:
                raise ValueError("the body must have 1 MiB at most")
            return self.rfile.read(int(length)).decode(errors="replace")

        def do_POST(self):
            try:
                body = self.body()
                if self.path == "/offer":
                    if not peers.source.playing:
                        self.reply(503, "the source is not connected\n")
                    elif len(peers.all) >= peers.args.clients:
                        self.reply(503, "too many clients\n")
                    else:
                        self.reply(200, json.dumps(peers.offer()), "application/json")
                else:
                    peers.answer(self.path.removeprefix("/answer/"), body)
                    self.reply(200, "")
            except (KeyError, ValueError, TimeoutError) as error:
                self.reply(400, f"{error}\n")

        def log_message(self, *_):
            pass

    return Handler


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *address):
        # A browser that leaves is not an error.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*address)


def arguments(doc):
    """Returns a parser with the options of servers for browsers."""
    parser = relay.arguments(doc)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--port", type=int, default=8080, help="TCP port of HTTP (default 8080)")
    parser.add_argument("--stun", metavar="URI", help="STUN server, for browsers in other networks")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="maximum (default 16)")
    return parser


def serve(args, source, handler):
    """Plays the source and serves the page until the program is interrupted."""
    relay.first_element(["nicesrc"], "gstreamer1.0-nice")
    try:
        server = Server(("", args.port), handler)
    except OSError as error:
        relay.fail(f"port {args.port}: {error.strerror}; choose another --port")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://localhost:{args.port}", flush=True)
    relay.run(args, [source])


def main():
    args = arguments(__doc__).parse_args()
    source = relay.Relay("webrtc", args.source, args, audio="opus", profile=PROFILE)
    serve(args, source, handler(Peers(args, source)))


if __name__ == "__main__":
    main()
