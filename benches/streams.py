#!/usr/bin/python3
"""Upscales several streams at once in one process, and prints how evenly they share the machine.

    benches/streams.py                                  # as fast as possible
    benches/streams.py --live --frames 1800             # in real time, with overload=adapt

GStreamer has to find the plugin (GST_PLUGIN_PATH). `seconds` is the time from the common start to
the end of a stream, `shown` the number of frames that reach the sink in time.
"""

import argparse
import threading
import time

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

Gst.init(None)

ROW = "{:>6} {:>8} {:>7} {:>7} {:>7} {:>8} {:>8}  {}"
KINDS = Gst.MessageType.EOS | Gst.MessageType.ERROR | Gst.MessageType.ELEMENT | Gst.MessageType.LATENCY


class Stream:
    """A pipeline from a test source through the element into a sink."""

    def __init__(self, args):
        width, height = args.size.split("x")
        # As sinks for windows: no frame is shown that is more than 20 ms late.
        sink = "sync=true qos=true max-lateness=20000000" if args.live else "sync=false"
        self.pipeline = Gst.parse_launch(
            f"videotestsrc pattern=ball num-buffers={args.frames} is-live={args.live} ! "
            f"video/x-raw,format=I420,width={width},height={height},framerate=30/1 ! queue max-size-buffers=4 ! "
            f"tadsrupscale name=upscaler {args.upscale} ! fakesink name=sink {sink}"
        )
        self.models, self.seconds, self.error = [], 0, None
        self.pipeline.set_state(Gst.State.PAUSED)
        self.pipeline.get_state(Gst.CLOCK_TIME_NONE)

    def run(self, start):
        """Waits for the end, and notes the models that the element selects."""
        bus = self.pipeline.get_bus()
        while True:
            message = bus.timed_pop_filtered(Gst.CLOCK_TIME_NONE, KINDS)
            if message.type == Gst.MessageType.ERROR:
                self.error = message.parse_error()[0].message
            elif message.type == Gst.MessageType.LATENCY:
                self.pipeline.recalculate_latency()
            elif message.type == Gst.MessageType.ELEMENT and message.get_structure().has_field("model"):
                self.models.append(message.get_structure().get_value("model"))
            if message.type in (Gst.MessageType.EOS, Gst.MessageType.ERROR):
                self.seconds = time.monotonic() - start
                return

    def values(self):
        """Returns the values of a row of the table."""
        upscaler = self.pipeline.get_by_name("upscaler")
        stats = upscaler.get_property("stats")
        shown = self.pipeline.get_by_name("sink").get_property("stats").get_value("rendered")
        counts = [stats.get_value("frames"), stats.get_value("dropped"), shown]
        times = [f"{stats.get_value(name):.1f}" for name in ("mean-ms", "p99-ms")]
        models = " > ".join(self.models or [upscaler.get_property("active-model")])
        return [f"{self.seconds:.2f}", *counts, *times, self.error or models]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--frames", type=int, default=300, help="of each stream (default 300)")
    parser.add_argument("--size", default="480x270", metavar="WxH", help="of the sources (default 480x270)")
    parser.add_argument("--upscale", default="scale=2", help="properties of the element (default scale=2)")
    parser.add_argument("--live", action="store_true", help="play in real time with overload=adapt")
    args = parser.parse_args()
    if args.live:
        args.upscale += " overload=adapt"
    streams = [Stream(args) for _ in range(args.streams)]
    start = time.monotonic()
    for stream in streams:
        stream.pipeline.set_state(Gst.State.PLAYING)
    threads = [threading.Thread(target=stream.run, args=[start]) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(ROW.format("stream", "seconds", "frames", "dropped", "shown", "mean-ms", "p99-ms", "models"))
    for number, stream in enumerate(streams, 1):
        print(ROW.format(number, *stream.values()))
        stream.pipeline.set_state(Gst.State.NULL)
    times = [stream.seconds for stream in streams]
    print(f"last / first to finish: {max(times) / min(times):.3f}")
    return any(stream.error for stream in streams)


if __name__ == "__main__":
    raise SystemExit(main())
