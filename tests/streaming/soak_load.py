#!/usr/bin/python3
"""Upscales a live source while the machine is idle, under load on all cores, and idle again.

    tests/streaming/soak_load.py [MINUTES] [UPSCALER]

The load lasts MINUTES (default 5), each idle phase a minute. UPSCALER are the element and its
properties (default `tadsrupscale scale=2 overload=adapt`). Fails if the sink, which shows no frame
that is more than 20 ms late, misses more than 2 % of the frames in the second half of a phase, when
the element has selected a model. The times are from the timestamp of a frame to its end in the
element.
"""

import os
import subprocess
import sys
import threading
import time

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

Gst.init(None)

FPS = 30
ROW = "{:<18} {:>6} {:>6} {:>10} {:>8} {:>8}"


class Stream:
    def __init__(self, upscaler):
        self.pipeline = Gst.parse_launch(
            f"videotestsrc is-live=true ! video/x-raw,format=I420,width=640,height=360,framerate={FPS}/1 ! "
            f"identity name=source ! queue max-size-buffers=4 ! {upscaler} name=upscaler ! "
            "fakesink name=sink sync=true qos=true max-lateness=20000000"
        )
        self.source, self.upscaler, self.sink = map(self.pipeline.get_by_name, ("source", "upscaler", "sink"))
        self.received, self.delays = 0, []
        self.source.get_static_pad("src").add_probe(Gst.PadProbeType.BUFFER, self.on_source)
        self.upscaler.get_static_pad("src").add_probe(Gst.PadProbeType.BUFFER, self.on_frame)
        self.pipeline.set_state(Gst.State.PLAYING)
        threading.Thread(target=self.watch, daemon=True).start()

    def on_source(self, _pad, _info):
        self.received += 1
        return Gst.PadProbeReturn.OK

    def on_frame(self, _pad, info):
        """Notes the time from the timestamp of a frame to its end in the element."""
        now = self.pipeline.get_clock().get_time() - self.pipeline.get_base_time()
        self.delays.append((now - info.get_buffer().pts) / Gst.MSECOND)
        return Gst.PadProbeReturn.OK

    def watch(self):
        """Prints the messages of the element."""
        start, bus = time.monotonic(), self.pipeline.get_bus()
        kinds = Gst.MessageType.ERROR | Gst.MessageType.ELEMENT | Gst.MessageType.LATENCY
        while True:
            message = bus.timed_pop_filtered(Gst.CLOCK_TIME_NONE, kinds)
            if message.type == Gst.MessageType.ERROR:
                print(message.parse_error(), flush=True)
                os._exit(1)
            structure = message.get_structure()
            if message.type == Gst.MessageType.LATENCY:
                self.pipeline.recalculate_latency()
            elif structure.has_field("model"):
                text = f"{structure.get_value('model')}, because {structure.get_value('reason')}"
                print(f"{time.monotonic() - start:.1f} s: {structure.get_name()}: {text}", flush=True)

    def counts(self):
        return self.received, self.sink.get_property("stats").get_value("rendered")


def phase(stream, name, seconds):
    """Prints a row for each half of a phase. Returns the share of frames missing in the second."""
    for half in ("first", "second"):
        before, first = stream.counts(), len(stream.delays)
        time.sleep(seconds / 2)
        received, shown = (now - then for now, then in zip(stream.counts(), before))
        delays = sorted(stream.delays[first:]) or [float("nan")]
        p99 = delays[len(delays) * 99 // 100]
        values = received, shown, f"{delays[len(delays) // 2]:.1f}", f"{p99:.1f}", f"{delays[-1]:.1f}"
        print(ROW.format(f"{name}, {half} half", *values), flush=True)
    return 1 - shown / max(received, 1)


def main():
    minutes = float(sys.argv[1]) if sys.argv[1:] else 5
    stream = Stream(" ".join(sys.argv[2:]) or "tadsrupscale scale=2 overload=adapt")
    print(ROW.format("", "in", "shown", "median-ms", "p99-ms", "max-ms"))
    missing = [phase(stream, "idle", 60)]
    load = [subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(os.cpu_count())]
    try:
        missing.append(phase(stream, "load", 60 * minutes))
    finally:
        for process in load:
            process.kill()
            process.wait()
    missing.append(phase(stream, "idle", 60))
    stream.pipeline.set_state(Gst.State.NULL)
    return max(missing) > 0.02


if __name__ == "__main__":
    sys.exit(main())
