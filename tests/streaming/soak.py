#!/usr/bin/python3
"""Runs rtsp.py with a source that changes its size and ends every few seconds, clients that come and
go, and clients that never read.

    tests/streaming/soak.py [MINUTES] [MIB]

Fails if the memory of the server grows by more than MIB (default 64) after the first quarter of the
time (default 10 minutes), or if fewer clients than one a minute get video, or fewer than one a
minute never read.
"""

import atexit
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from test_streaming import EXAMPLES, Process, free_port, metrics, rtsp_client, stalled_client


def resident(process):
    """Returns the memory of a process in MiB."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s*(\d+)", status)[1]) / 1024


def main():
    given = [float(text) for text in sys.argv[1:]]
    minutes, limit = given + [10, 64][len(given) :]
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.ts"
        part = "videotestsrc num-buffers=50 ! video/x-raw,format=I420,width={},height={},framerate=25/1 ! parts."
        video = f"concat name=parts ! x264enc ! h264parse config-interval=-1 ! mux. {part.format(320, 180)}"
        audio = "audiotestsrc num-buffers=172 ! avenc_aac ! mux."
        sink = f"mpegtsmux name=mux ! filesink location={clip}"
        command = f"{video} {part.format(256, 144)} {audio} {sink}"
        subprocess.run(["gst-launch-1.0", "-q", *command.split()], check=True, timeout=120)
        port, metrics_port = free_port(), free_port()
        args = ["--port", port, "--metrics", metrics_port, "--retry", 0.5]
        # As in tadsr-rtsp.service.
        env = {**os.environ, "MALLOC_ARENA_MAX": "2"}
        server = Process(sys.executable, EXAMPLES / "rtsp.py", clip, *args, env=env)
        # Also after an error.
        atexit.register(server.process.kill)
        server.wait_for("playing")
        start, warm, clients, stalled, sizes = time.monotonic(), None, 0, 0, set()
        while (elapsed := time.monotonic() - start) < 60 * minutes:
            if warm is None and elapsed > 15 * minutes:
                warm = resident(server)
            silent = stalled_client(port)
            viewer = rtsp_client(f"rtsp://localhost:{port}/upscaled")
            end = time.monotonic() + 20
            while len(viewer.frames) < 60 and time.monotonic() < end:
                time.sleep(0.1)
            # While the source is away, there is nothing to connect to.
            clients += len(viewer.frames) >= 60
            sizes |= {size for _, size in viewer.frames}
            viewer.stop()
            if silent:
                stalled += 1
                silent.close()
        values = {name.split("{")[0]: value for name, value in metrics(metrics_port).items()}
        grown = resident(server) - warm
        status = server.stop()
    print(
        f"{minutes:g} minutes, {clients} clients with video, {stalled} that never read, "
        f"{values['tadsr_source_starts_total']:.0f} starts of the source, {values['tadsr_frames_total']:.0f} frames "
        f"of {len(sizes)} sizes; memory {warm:.0f} MiB, then {grown:+.0f} MiB"
    )
    sys.exit(grown > limit or min(clients, stalled) < minutes or len(sizes) != 2 or status != 0)


if __name__ == "__main__":
    main()
