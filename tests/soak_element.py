#!/usr/bin/python3
"""Runs the element for a long time while one thread pushes frames and caps, and another changes
properties and flushes at random moments.

    GST_PLUGIN_PATH=target/release tests/soak_element.py [MINUTES] [MIB] [SEED]

Fails if a frame leaves out of order or is neither returned nor counted as dropped, if the element
posts an error, or if memory grows by more than MIB (default 48) after the first quarter of the time
(default 10 minutes).
"""

import os
import random
import re
import sys
import threading
import time
from pathlib import Path

# Warnings and criticals of GLib end the process.
os.environ["G_DEBUG"] = "fatal-warnings"
import gi  # noqa: E402

gi.require_version("Gst", "1.0")
gi.require_version("GstVideo", "1.0")
from gi.repository import Gst, GstVideo  # noqa: E402

FORMATS = ["I420", "NV12", "RGB", "RGBA", "P010_10LE", "Y444", "YUY2", "GRAY8", "I420_10LE", "GBR"]
# Models that are not compiled in.
FILES = [str(path) for path in sorted((Path(__file__).parents[1] / "models").glob("*.safetensors"))]
SETTINGS = {
    "model": ["auto", "tiny", "small", "tiny-x2", "tiny-x4"] + [f for f in FILES if "estimator" not in f],
    "scale": [0.0, 1.0, 1.5, 2.0, 2.0, 2.5, 3.0, 4.0],
    "strength": [0.0, 0.5, 1.0, 1.0],
    "denoise": [-1.0, -1.0, 0.0, 0.3, 1.0],
    "detail": [0.0, 0.5, 1.0],
    "temporal": ["auto", "off", "filter", "memory"],
    "precision": ["auto", "f32", "bf16", "int16", "int8"],
    "overload": ["auto", "drop", "adapt"],
    "threads": [0, 1, 2, 3],
    "stats-interval": [0, 50, 1000],
}


def resident():
    """Returns the memory of this process in MiB."""
    return int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


class Rig:
    """The element between two pads of this program."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.element = Gst.ElementFactory.make("tadsrupscale")
        self.element.set_property("device", "cpu")
        # A model for scales up to 2 is not an error at scale 3.
        self.element.set_property("fallback", "bicubic")
        self.bus = Gst.Bus.new()
        self.element.set_bus(self.bus)
        # Templates, because a pad without one accepts only its current caps.
        self.source, self.sink = (
            Gst.Pad.new_from_template(Gst.PadTemplate.new(name, way, Gst.PadPresence.ALWAYS, Gst.Caps.new_any()), name)
            for name, way in (("src", Gst.PadDirection.SRC), ("sink", Gst.PadDirection.SINK))
        )
        self.sink.set_chain_function_full(self.receive)
        self.source.link(self.element.get_static_pad("sink"))
        self.element.get_static_pad("src").link(self.sink)
        self.sink.set_active(True)
        self.element.set_state(Gst.State.PLAYING)
        self.source.set_active(True)
        self.source.push_event(Gst.Event.new_stream_start("soak"))
        self.time, self.last = 0, -1
        self.pushed = self.received = self.refused = self.flushes = self.changes = 0
        self.stop, self.fault = False, None
        # A flush and the serialised events after it are not interleaved with those of the other thread.
        self.lock = threading.Lock()

    def receive(self, pad, parent, buffer):
        self.received += 1
        if buffer.pts <= self.last:
            self.fault = f"frame at {buffer.pts} after {self.last}"
        self.last = buffer.pts
        return Gst.FlowReturn.OK

    def caps(self):
        """Changes format, size and rate of the input. Returns the size of a frame in bytes."""
        # Even, so that half a pixel times the scale is whole.
        width, height = 2 * self.random.randint(4, 100), 2 * self.random.randint(4, 60)
        text = (
            f"video/x-raw,format={self.random.choice(FORMATS)},width={width},height={height},"
            f"framerate={self.random.choice([0, 24, 30, 60])}/1"
        )
        caps = Gst.Caps.from_string(text)
        if not self.source.push_event(Gst.Event.new_caps(caps)):
            self.fault = f"the element refuses {text}"
        segment = Gst.Segment()
        segment.init(Gst.Format.TIME)
        self.source.push_event(Gst.Event.new_segment(segment))
        return GstVideo.VideoInfo.new_from_caps(caps).size

    def push(self):
        """Pushes frames, until told to stop."""
        size = None
        while not self.stop:
            with self.lock:
                if size is None or self.random.random() < 0.02:
                    size = self.caps()
                buffer = Gst.Buffer.new_wrapped(self.random.randbytes(size))
                buffer.pts, buffer.duration = self.time, Gst.SECOND // 30
                self.time += Gst.SECOND // 30
                if self.random.random() < 0.01:
                    buffer.set_flags(Gst.BufferFlags.DISCONT)
                self.pushed += 1
            result = self.source.push(buffer)
            if result == Gst.FlowReturn.FLUSHING:
                # A flush dropped it. The segment that ended with the flush is sent again.
                self.refused += 1
                size = None
            elif result != Gst.FlowReturn.OK:
                self.fault = f"pushing a frame: {result}"

    def change(self):
        """Changes properties and flushes, until told to stop."""
        choice = random.Random(self.random.random())
        while not self.stop:
            time.sleep(choice.uniform(0, 0.05))
            if choice.random() < 0.03:
                self.source.push_event(Gst.Event.new_flush_start())
                with self.lock:
                    self.source.push_event(Gst.Event.new_flush_stop(False))
                    segment = Gst.Segment()
                    segment.init(Gst.Format.TIME)
                    self.source.push_event(Gst.Event.new_segment(segment))
                self.flushes += 1
            else:
                name = choice.choice(list(SETTINGS))
                self.element.set_property(name, choice.choice(SETTINGS[name]))
                self.changes += 1

    def check(self):
        """Raises SystemExit after a fault."""
        while message := self.bus.pop():
            if message.type == Gst.MessageType.ERROR:
                self.fault = message.parse_error().gerror.message
        if self.fault:
            sys.exit(f"after {self.pushed} frames: {self.fault}")


def main():
    given = [float(text) for text in sys.argv[1:]]
    minutes, limit, seed = given + [10, 48, 1][len(given) :]
    Gst.init(None)
    rig = Rig(seed)
    threads = [threading.Thread(target=work, daemon=True) for work in (rig.push, rig.change)]
    for thread in threads:
        thread.start()
    start, warm, most = time.monotonic(), None, 0
    before = -1
    while (elapsed := time.monotonic() - start) < 60 * minutes:
        time.sleep(min(20, 10 * minutes))
        rig.check()
        if rig.pushed == before:
            sys.exit(f"no frame in {time.monotonic() - start - elapsed:.0f} seconds, after {before}")
        before = rig.pushed
        if elapsed > 15 * minutes:
            warm = warm or resident()
            most = max(most, resident())
    rig.stop = True
    for thread in threads:
        thread.join(60)
    rig.source.push_event(Gst.Event.new_eos())
    rig.check()
    stats = rig.element.get_property("stats")
    dropped = stats.get_value("dropped")
    rig.element.set_state(Gst.State.NULL)
    print(
        f"{minutes:g} minutes, {rig.pushed} frames in, {rig.received} out, {dropped} dropped, {rig.refused} refused by "
        f"a flush, {rig.changes} changes of properties, {rig.flushes} flushes; memory {warm:.0f} MiB, then at most "
        f"{most - warm:+.0f} MiB"
    )
    if rig.received + dropped + rig.refused != rig.pushed:
        sys.exit(f"{rig.pushed - rig.received - dropped - rig.refused} frames are missing")
    sys.exit(most - warm > limit)


if __name__ == "__main__":
    main()
