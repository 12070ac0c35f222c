"""Plays a source, upscales and encodes it once, and passes it on to any number of outputs.

The servers in this folder share this module. A `Relay` starts its source again when it fails, so
that the outputs live on. An `Output` is one bin that receives the encoded streams.
"""

import argparse
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstVideo", "1.0")
from gi.repository import GLib, Gst, GstVideo  # noqa: E402

Gst.init(None)

VIDEO_ENCODERS = {
    "x264enc": "x264enc tune=zerolatency speed-preset=superfast key-int-max=60 bitrate={kbit}",
    "openh264enc": "openh264enc complexity=low gop-size=60 rate-control=bitrate bitrate={bit}",
}
# Caps of audio that is copied, elements that complete them, encoders for all other audio.
AUDIO = {
    "aac": (
        "audio/mpeg,mpegversion={(int)2,(int)4}",
        "aacparse ! audio/mpeg,stream-format=raw",
        ["avenc_aac", "voaacenc", "fdkaacenc"],
    ),
    "opus": ("audio/x-opus", "opusparse", ["opusenc"]),
}
# Plays 0.3 s behind the source, so that a slow frame is not late at once. Later frames make the
# upscaler drop some, if qos is set.
SINK = (
    "queue max-size-time=2000000000 max-size-bytes=0 max-size-buffers=0 ! "
    "appsink name={} emit-signals=true sync=true ts-offset=300000000 qos={}"
)
# Drops the oldest data if the output does not take them.
SOURCE = "appsrc name={} is-live=true format=time max-bytes=0 max-time=2000000000 leaky-type=downstream"

COPY = Gst.BufferCopyFlags.FLAGS | Gst.BufferCopyFlags.META | Gst.BufferCopyFlags.MEMORY


def arguments(doc):
    """Returns a parser with the options that all servers have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upscale", default="tadsrupscale scale=2", help="element with its properties")
    parser.add_argument("--encoder", help="H.264 encoder with its properties (default: x264enc or openh264enc)")
    parser.add_argument("--bitrate", type=int, default=4000, metavar="KBIT", help="of the video (default %(default)s)")
    parser.add_argument("--latency", type=int, default=500, metavar="MS", help="buffer of RTSP and SRT sources")
    parser.add_argument("--timeout", type=float, default=10, metavar="S", help="start a source without video again")
    parser.add_argument("--retry", type=float, default=2, metavar="S", help="pause before the next start")
    parser.add_argument(
        "--once", action="store_true", help="play the source once, and drop no frame; an error ends the program"
    )
    parser.add_argument("--metrics", type=int, metavar="PORT", help="serve metrics for Prometheus on this port")
    return parser


def fail(message):
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def log(name, message):
    print(f"{name}: {message}", file=sys.stderr, flush=True)


def first_element(names, package):
    """Returns the first of the elements that is installed."""
    found = next(filter(Gst.ElementFactory.find, names), None)
    return found or fail(f"none of {', '.join(names)} is installed; on Debian: apt-get install {package}")


def uri_of(source):
    """Returns the URI of a file, a camera such as /dev/video0, the test pattern `test` or a URI."""
    if source == "test":
        return "testbin://video+audio"
    if source.startswith("/dev/video"):
        return f"v4l2://{source}"
    if Gst.uri_is_valid(source):
        return source
    if not Path(source).is_file():
        fail(f"'{source}' is neither a file nor a URI, a camera in /dev or 'test'")
    return Path(source).resolve().as_uri()


def refuse_loop(source, port):
    """Ends the program if the source is an address of this machine with the port of the server."""
    try:
        parts = urlsplit(source)
        own = parts.port == port and parts.scheme in ("rtsp", "srt")
        if own and parts.hostname in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
            fail(f"the source '{source}' is this server itself; choose another --port")
    except ValueError as error:
        fail(f"'{source}': {error}")


class Relay:
    """A source whose upscaled H.264 and AAC or Opus go to `outputs`."""

    def __init__(self, name, source, args, audio="aac", profile=""):
        self.name, self.args, self.uri = name, args, uri_of(source)
        self.outputs, self.lock = set(), threading.Lock()
        self.clock = Gst.SystemClock.obtain()
        self.pipeline, self.upscaler, self.reason = None, None, None
        self.playing, self.has_audio, self.failed = False, False, False
        self.starts, self.totals = 0, Counter()
        # Called in the main loop: a connection delivers frames; it has failed; the source has ended.
        self.on_start = self.on_stop = self.on_end = lambda: None

        encoder = args.encoder
        if not encoder:
            element = first_element(VIDEO_ENCODERS, "gstreamer1.0-plugins-ugly")
            encoder = VIDEO_ENCODERS[element].format(kbit=args.bitrate, bit=1000 * args.bitrate)
        self.video_branch = (
            "queue max-size-buffers=4 max-size-bytes=0 max-size-time=0 ! deinterlace fields=top ! "
            f"videoconvert ! video/x-raw,format=I420 ! {args.upscale} ! queue max-size-buffers=4 ! "
            f"videoconvert ! {encoder} ! {f'video/x-h264,profile={profile} ! ' if profile else ''}"
            "h264parse config-interval=-1 ! video/x-h264,stream-format=byte-stream,alignment=au ! "
            + SINK.format("video", not args.once)
        )
        self.audio_caps, complete, encoders = AUDIO[audio]
        encode = f"audioconvert ! audioresample ! {first_element(encoders, 'gstreamer1.0-libav')}"
        self.copy_branch = f"queue ! {complete} ! {SINK.format('audio', False)}"
        self.encode_branch = f"queue ! {encode} ! {complete} ! {SINK.format('audio', False)}"
        for branch in (self.video_branch, self.copy_branch, self.encode_branch):
            try:
                Gst.parse_bin_from_description(branch, True)
            except GLib.Error as error:
                fail(f"{error.message}; see --help and docs/streaming.md")
        GLib.timeout_add_seconds(1, self.check)

    def start(self):
        self.starts += 1
        self.branches, self.caps = {}, {}
        self.ready, self.last_frame = threading.Event(), time.monotonic()
        self.pipeline = Gst.Pipeline.new(None)
        self.pipeline.use_clock(self.clock)
        decoder = Gst.ElementFactory.make("uridecodebin")
        decoder.set_property("uri", self.uri)
        caps = Gst.Caps.from_string(f"video/x-raw(ANY); audio/x-raw(ANY); {self.audio_caps}")
        decoder.set_property("caps", caps)
        decoder.connect("source-setup", self.on_source)
        decoder.connect("pad-added", self.on_pad)
        decoder.connect("no-more-pads", self.on_no_more_pads)
        self.pipeline.add(decoder)
        bus = self.pipeline.get_bus()
        bus.add_signal_watch()
        bus.connect("message", self.on_message)
        self.pipeline.set_state(Gst.State.PLAYING)
        return GLib.SOURCE_REMOVE

    def stop(self):
        if self.pipeline:
            self.pipeline.get_bus().remove_signal_watch()
            stats = self.stats()
            self.pipeline.set_state(Gst.State.NULL)
            self.pipeline, self.upscaler, self.playing = None, None, False
            self.totals = Counter({key: stats[key] for key in ("frames", "dropped")})

    def lost(self, reason):
        """Starts the source again after a pause, or ends with --once."""
        if self.pipeline is None:
            return
        if self.args.once:
            self.failed = True
            log(self.name, reason)
            self.on_end()
            return
        was_playing = self.playing
        self.stop()
        if reason != self.reason:
            self.reason = reason
            log(self.name, f"{reason}; trying again every {self.args.retry:g} s")
        if was_playing:
            self.on_stop()
        GLib.timeout_add(int(1000 * self.args.retry), self.start)

    def check(self):
        if self.pipeline and time.monotonic() - self.last_frame > self.args.timeout:
            self.lost(f"no video from {self.shown()} for {self.args.timeout:g} s")
        return GLib.SOURCE_CONTINUE

    def shown(self):
        """Returns the URI without user and password."""
        return re.sub("//[^/@]*@", "//", self.uri)

    def on_source(self, _decoder, source):
        for name in ("rtspsrc", "srtsrc"):
            if source.get_factory().get_name() == name:
                source.set_property("latency", self.args.latency)

    def on_pad(self, _decoder, pad):
        name = (pad.get_current_caps() or pad.query_caps(None)).get_structure(0).get_name()
        kind = name.split("/")[0]
        branch = self.branches.get(kind)
        if branch is None:
            copied = {"video/x-raw": self.video_branch, "audio/x-raw": self.encode_branch}
            branch = Gst.parse_bin_from_description(copied.get(name, self.copy_branch), True)
            self.branches[kind] = branch
            branch.get_by_name(kind).connect("new-sample", self.on_sample, kind)
            if kind == "video":
                self.prepare(branch)
            self.pipeline.add(branch)
            branch.sync_state_with_parent()
        sink = branch.get_static_pad("sink")
        # Further streams of a kind are not used.
        if not sink.is_linked() and pad.link(sink) != Gst.PadLinkReturn.OK:
            GLib.idle_add(self.lost, f"the source changes to {name}")

    def prepare(self, branch):
        """Finds the upscaler in the elements for video, before they start."""
        found = branch.iterate_all_by_element_factory_name("tadsrupscale").next()
        self.upscaler = found[1]

    def on_no_more_pads(self, _decoder):
        if "video" not in self.branches:
            GLib.idle_add(self.lost, f"{self.shown()} has no video")

    def on_sample(self, sink, kind):
        sample = sink.emit("pull-sample")
        buffer = sample.get_buffer()
        running = sample.get_segment().to_running_time(Gst.Format.TIME, buffer.pts)
        if running == Gst.CLOCK_TIME_NONE:
            return Gst.FlowReturn.OK
        self.caps[kind] = sample.get_caps()
        if kind == "video":
            self.last_frame = time.monotonic()
            if not self.playing:
                self.begin(running)
        elif not self.ready.wait(0.2):
            return Gst.FlowReturn.OK
        with self.lock:
            outputs = list(self.outputs)
        for output in outputs:
            output.push(kind, sample.get_caps(), buffer, running + self.shift)
        return Gst.FlowReturn.OK

    def begin(self, running):
        """Lets the server open its outputs at the first frame, which they receive."""
        end = time.monotonic() + 1
        while self.branches.keys() - self.caps.keys() and time.monotonic() < end:
            time.sleep(0.01)
        self.playing, self.has_audio, self.reason = True, "audio" in self.caps, None
        opened = threading.Event()
        GLib.idle_add(lambda: (self.on_start(), opened.set()) and GLib.SOURCE_REMOVE)
        opened.wait(5)
        # Each connection begins at the present time, so that times grow over connections.
        self.shift = self.clock.get_time() - running
        self.ready.set()
        log(self.name, f"playing {self.shown()}")

    def on_message(self, _bus, message):
        if message.type == Gst.MessageType.ERROR:
            self.lost(text_of(message))
        elif message.type == Gst.MessageType.EOS:
            if self.args.once:
                self.on_end()
            else:
                self.lost("the source has ended")
        elif message.type == Gst.MessageType.LATENCY:
            self.pipeline.recalculate_latency()
        elif message.type == Gst.MessageType.QOS and message.src != self.upscaler:
            # The decoder or a converter has dropped a late frame, which the upscaler does not see.
            self.totals["dropped"] += 1

    def request_keyframe(self):
        sink = self.pipeline and self.pipeline.get_by_name("video")
        if sink:
            event = GstVideo.video_event_new_upstream_force_key_unit(Gst.CLOCK_TIME_NONE, True, 0)
            sink.get_static_pad("sink").push_event(event)

    def stats(self):
        """Returns the element's `stats`, with `frames` and `dropped` of all connections."""
        stats, upscaler = {}, self.upscaler
        if upscaler:
            structure = upscaler.get_property("stats")
            fields = map(structure.nth_field_name, range(structure.n_fields()))
            stats = {field: structure.get_value(field) for field in fields}
        for key in ("frames", "dropped"):
            stats[key] = stats.get(key, 0) + self.totals[key]
        return stats


class Output:
    """A bin whose appsrc elements `video` and `audio` receive the streams of a relay."""

    def __init__(self, relay, element):
        self.relay = relay
        sources = {kind: element.get_by_name(kind) for kind in ("video", "audio")}
        self.sources = {kind: source for kind, source in sources.items() if source}
        for kind, source in self.sources.items():
            # Multiplexers need all caps before the first data.
            source.set_property("caps", relay.caps.get(kind))
        self.started = False
        pad = self.sources["video"].get_static_pad("src")
        pad.add_probe(Gst.PadProbeType.EVENT_UPSTREAM, self.on_event)
        with relay.lock:
            relay.outputs.add(self)
        relay.request_keyframe()

    def close(self):
        with self.relay.lock:
            self.relay.outputs.discard(self)

    def on_event(self, _pad, info):
        if GstVideo.video_event_is_force_key_unit(info.get_event()):
            self.relay.request_keyframe()
        return Gst.PadProbeReturn.OK

    def push(self, kind, caps, buffer, clock_time):
        """Passes a buffer on. The time is that of the system clock."""
        source = self.sources.get(kind)
        base = source.get_base_time() if source else 0
        # The pipeline has a base time once it plays.
        early = not 0 < base <= clock_time
        keyframe = kind == "video" and not buffer.has_flags(Gst.BufferFlags.DELTA_UNIT)
        if keyframe and early and not self.started:
            # Until the next one, the output would be without video.
            self.relay.request_keyframe()
        self.started = self.started or keyframe and not early
        if early or not self.started:
            return
        copy = buffer.copy_region(COPY, 0, buffer.get_size())
        copy.pts = clock_time - base
        if buffer.dts != Gst.CLOCK_TIME_NONE:
            copy.dts = max(0, copy.pts + buffer.dts - buffer.pts)
        source.emit("push-sample", Gst.Sample.new(copy, caps, None, None))


class Pipeline(Output):
    """An output that is a pipeline of its own."""

    def __init__(self, relay, pipeline, on_error):
        self.pipeline = pipeline
        self.pipeline.use_clock(relay.clock)
        bus = self.pipeline.get_bus()
        bus.add_signal_watch()
        bus.connect("message::error", lambda _bus, message: on_error(text_of(message)))
        super().__init__(relay, self.pipeline)
        self.pipeline.set_state(Gst.State.PLAYING)

    def close(self):
        """Completes files and connections."""
        super().close()
        bus = self.pipeline.get_bus()
        bus.remove_signal_watch()
        if self.started:
            for source in self.sources.values():
                source.emit("end-of-stream")
            bus.timed_pop_filtered(5 * Gst.SECOND, Gst.MessageType.EOS | Gst.MessageType.ERROR)
        self.pipeline.set_state(Gst.State.NULL)


def send(relay, build):
    """Sends a relay to the pipeline that `build` returns. After an error, and if audio comes or
    goes, it is built again."""
    output = None

    def start():
        nonlocal output
        if output and ("audio" in output.sources) != relay.has_audio:
            output.close()
            output = None
        if output is None:
            output = Pipeline(relay, build(), on_error)
        return GLib.SOURCE_REMOVE

    def on_error(text):
        nonlocal output
        log(relay.name, f"{text}; trying again in {relay.args.retry:g} s")
        output.close()
        output = None
        GLib.timeout_add(int(1000 * relay.args.retry), start)

    relay.on_start = start


def text_of(message):
    """Returns an error message with the last line of its details, which often has the reason."""
    error, debug = message.parse_error()
    detail = (debug or "").strip().splitlines()[-1:] or [""]
    return f"{error.message} {detail[0]}".strip()


def run(args, relays):
    """Plays the relays until the program is interrupted, or with --once until a source ends."""
    loop = GLib.MainLoop()
    if args.metrics:
        serve_metrics(args.metrics, relays)
    for number in (signal.SIGINT, signal.SIGTERM):
        GLib.unix_signal_add(GLib.PRIORITY_DEFAULT, number, loop.quit)
    for relay in relays:
        relay.on_end = loop.quit
        relay.start()
    loop.run()
    for relay in relays:
        relay.stop()
        for output in list(relay.outputs):
            output.close()
    sys.exit(any(relay.failed for relay in relays))


def serve_metrics(port, relays):
    try:
        from prometheus_client import REGISTRY, start_http_server
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError:
        fail("--metrics needs prometheus_client; on Debian: apt-get install python3-prometheus-client")

    class Collector:
        def collect(self):
            def family(kind, name, text, value, labels=("stream",)):
                metric = kind(f"tadsr_{name}", text, labels=labels)
                for relay in relays:
                    for *extra, number in value(relay, relay.stats()):
                        metric.add_metric([relay.name, *extra], number)
                return metric

            count, gauge = CounterMetricFamily, GaugeMetricFamily
            yield family(gauge, "source_up", "1 if the source delivers video", lambda r, s: [[int(r.playing)]])
            yield family(count, "source_starts", "Starts of the source", lambda r, s: [[r.starts]])
            yield family(gauge, "outputs", "Outputs that receive the stream", lambda r, s: [[len(r.outputs)]])
            yield family(count, "frames", "Upscaled frames", lambda r, s: [[s["frames"]]])
            yield family(
                count, "frames_dropped", "Frames dropped because they were late", lambda r, s: [[s["dropped"]]]
            )
            yield family(gauge, "frames_per_second", "Mean since the source started", lambda r, s: [[s.get("fps", 0)]])
            yield family(
                gauge,
                "frame_seconds",
                "Time of a frame in the upscaler: mean since the source started, 99th percentile of 1000 frames",
                lambda r, s: [[name, s[f"{name}-ms"] / 1000] for name in ("mean", "p99") if f"{name}-ms" in s],
                ("stream", "value"),
            )

    REGISTRY.register(Collector())
    try:
        start_http_server(port)
    except OSError as error:
        fail(f"--metrics {port}: {error.strerror}")
