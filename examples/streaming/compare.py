#!/usr/bin/python3
"""Compares bicubic interpolation with the network in a browser, with a divider between them.

SOURCE is a file, a camera (/dev/video0), a URI (rtsp, srt, rtmp, http) or 'test'. Each frame is
upscaled both ways. Both pictures are sent side by side in one video over WebRTC, and the page draws
a part of each. Model, denoise, detail and strength change while the video plays, for all browsers.

    compare.py test                                  # open http://localhost:8080
    compare.py film.mp4 --upscale 'tadsrupscale scale=3' --bitrate 20000
    compare.py /dev/video0 --models tiny,my-model.safetensors
"""

import collections
import json

import relay
import webrtc
from relay import Gst, GstVideo

# Late frames are dropped before the tee: the halves are always of the same frame.
COMPARE = (
    "tee name=frame frame. ! queue max-size-buffers=1 ! {0} name=bicubic strength=0 model=tiny qos=false ! both.sink_0 "
    "frame. ! queue max-size-buffers=1 ! {0} name=network qos=false ! both.sink_1 "
    "compositor name=both background=black start-time-selection=first"
)
NUMBERS = ("denoise", "detail", "strength")
FILES = {"/": "compare.html", "/webrtc.js": "webrtc.js"}


class Comparison(relay.Relay):
    """A relay that upscales each frame with and without the network."""

    def __init__(self, args):
        relay.first_element(["compositor"], "gstreamer1.0-plugins-base")
        args.upscale = COMPARE.format(args.upscale)
        super().__init__("compare", args.source, args, audio="opus", profile=webrtc.PROFILE)
        network = Gst.parse_bin_from_description(args.upscale, True).get_by_name("network")
        self.dials = {name: network.get_property(name) for name in ("model", *NUMBERS)}
        self.ranges = {name: network.find_property(name) for name in NUMBERS}
        self.models = list(dict.fromkeys([*args.models.split(","), self.dials["model"]]))
        self.warning = ""

    def prepare(self, branch):
        """Applies the dials and keeps the halves together."""
        self.upscaler = branch.get_by_name("network")
        for name, value in self.dials.items():
            self.upscaler.set_property(name, value)
        mixer = branch.get_by_name("both")
        halves = [mixer.get_static_pad(name) for name in ("sink_0", "sink_1")]
        latencies, times = {}, collections.deque()

        def on_caps(pad, _):
            if pad.get_current_caps():
                info = GstVideo.VideoInfo.new_from_caps(pad.get_current_caps())
                width = round(info.width * info.par_n / info.par_d)
                for number, half in enumerate(halves):
                    half.set_properties(xpos=number * width, width=width, height=info.height)

        # In a live pipeline, the compositor would go on without a half that is late, and repeat its
        # previous frame. So it must not know that the pipeline is live.
        def hide_latency(pad, info):
            query = info.get_query()
            if query.type == Gst.QueryType.LATENCY:
                latencies[pad] = query.parse_latency()
                query.set_latency(False, 0, Gst.CLOCK_TIME_NONE)
            return Gst.PadProbeReturn.OK

        def show_latency(_pad, info):
            query = info.get_query()
            if query.type == Gst.QueryType.LATENCY and latencies:
                live, low, high = zip(*latencies.values())
                query.set_latency(any(live), max(low), min(high))
            return Gst.PadProbeReturn.OK

        # The compositor fills gaps with repeated frames. To encode them would make a slow machine
        # slower.
        def on_input(pad, info):
            segment = pad.get_sticky_event(Gst.EventType.SEGMENT, 0).parse_segment()
            times.append(segment.to_running_time(Gst.Format.TIME, info.get_buffer().pts))
            return Gst.PadProbeReturn.OK

        def on_output(_pad, info):
            end = info.get_buffer().pts + info.get_buffer().duration
            fresh = bool(times) and times[0] < end
            while times and times[0] < end:
                times.popleft()
            return Gst.PadProbeReturn.OK if fresh else Gst.PadProbeReturn.DROP

        halves[1].add_probe(Gst.PadProbeType.BUFFER, on_input)
        mixer.get_static_pad("src").add_probe(Gst.PadProbeType.BUFFER, on_output)
        reply = Gst.PadProbeType.QUERY_UPSTREAM | Gst.PadProbeType.PULL
        for half in halves:
            half.connect("notify::caps", on_caps)
            half.add_probe(reply, hide_latency)
        mixer.get_static_pad("src").add_probe(reply, show_latency)

    def on_message(self, bus, message):
        if message.type == Gst.MessageType.WARNING and message.src == self.upscaler:
            self.warning = message.parse_warning()[0].message
        super().on_message(bus, message)

    def set_dials(self, dials):
        """Sets dials by their names. Sets none if one is refused."""
        if not isinstance(dials, dict):
            raise ValueError("dials are an object of JSON")
        for name, value in dials.items():
            if name == "model":
                if value not in self.models:
                    raise ValueError(f"the model must be one of {', '.join(self.models)}")
            elif name in NUMBERS:
                low, high = self.ranges[name].minimum, self.ranges[name].maximum
                if type(value) not in (int, float) or not low <= value <= high:
                    raise ValueError(f"{name} must be a number from {low:g} to {high:g}")
            else:
                raise ValueError(f"the dials are {', '.join(self.dials)}")
        self.warning = ""
        self.dials.update(dials)
        if upscaler := self.upscaler:
            for name, value in dials.items():
                upscaler.set_property(name, value)

    def state(self):
        """Returns the state that the page shows."""
        state = {"playing": self.playing, "reason": self.reason, "warning": self.warning}
        state.update(dials=self.dials, models=self.models)
        if upscaler := self.upscaler:
            # The mean covers the frames since the source started.
            state["stats"] = stats = self.stats()
            stats["frames"] -= self.totals["frames"]
            for key in ("active-model", "active-device"):
                state[key] = upscaler.get_property(key)
            for key in ("sink", "src"):
                if caps := upscaler.get_static_pad(key).get_current_caps():
                    info = GstVideo.VideoInfo.new_from_caps(caps)
                    state[key] = [info.width, info.height]
        return state


def handler(peers):
    class Handler(webrtc.handler(peers)):
        files = FILES

        def do_GET(self):
            if self.path == "/state":
                self.reply(200, json.dumps(peers.source.state()), "application/json")
            else:
                super().do_GET()

        def do_POST(self):
            if self.path != "/dials":
                super().do_POST()
                return
            try:
                peers.source.set_dials(json.loads(self.body()))
                self.reply(200, "")
            except (ValueError, RecursionError) as error:
                self.reply(400, f"{error}\n")

    return Handler


def main():
    parser = webrtc.arguments(__doc__)
    parser.add_argument(
        "--models", default="auto,tiny,small", metavar="MODEL,..", help="choice in the page (default %(default)s)"
    )
    # Two pictures, whose difference the encoder must not hide.
    parser.set_defaults(bitrate=12000)
    args = parser.parse_args()
    source = Comparison(args)
    webrtc.serve(args, source, handler(webrtc.Peers(args, source)))


if __name__ == "__main__":
    main()
