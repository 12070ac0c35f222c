#!/usr/bin/python3
"""Runs rtsp.py with a source that ends every few seconds and clients that come and go.

    tests/streaming/soak.py [MINUTES] [MIB]

Fails if the memory of the server grows by more than MIB (default 64) after the first quarter of the
time (default 10 minutes), or if fewer clients than one a minute get video.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from test_streaming import EXAMPLES, Process, free_port, metrics, rtsp_client


def resident(process):
    """Returns the memory of a process in MiB."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s*(\d+)", status)[1]) / 1024


def main():
    given = [float(text) for text in sys.argv[1:]]
    minutes, limit = given + [10, 64][len(given) :]
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        video = "videotestsrc num-buffers=100 ! video/x-raw,width=320,height=180,framerate=25/1 ! x264enc"
        audio = "audiotestsrc num-buffers=172 ! avenc_aac"
        command = f"{video} ! mux. {audio} ! mux. mp4mux name=mux ! filesink location={clip}"
        subprocess.run(["gst-launch-1.0", "-q", *command.split()], check=True, timeout=120)
        port, metrics_port = free_port(), free_port()
        args = ["--port", port, "--metrics", metrics_port, "--retry", 0.5]
        # As in tadsr-rtsp.service.
        env = {**os.environ, "MALLOC_ARENA_MAX": "2"}
        server = Process(sys.executable, EXAMPLES / "rtsp.py", clip, *args, env=env)
        server.wait_for("playing")
        start, warm, clients = time.monotonic(), None, 0
        while (elapsed := time.monotonic() - start) < 60 * minutes:
            if warm is None and elapsed > 15 * minutes:
                warm = resident(server)
            viewer = rtsp_client(f"rtsp://localhost:{port}/upscaled")
            end = time.monotonic() + 20
            while len(viewer.frames) < 60 and time.monotonic() < end:
                time.sleep(0.1)
            # While the source is away, there is nothing to connect to.
            clients += len(viewer.frames) >= 60
            viewer.stop()
        values = {name.split("{")[0]: value for name, value in metrics(metrics_port).items()}
        grown = resident(server) - warm
        status = server.stop()
    print(
        f"{minutes:g} minutes, {clients} clients with video, {values['tadsr_source_starts_total']:.0f} starts of the "
        f"source, {values['tadsr_frames_total']:.0f} frames; memory {warm:.0f} MiB, then {grown:+.0f} MiB"
    )
    sys.exit(grown > limit or clients < minutes or status != 0)


if __name__ == "__main__":
    main()
