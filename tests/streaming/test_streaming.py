"""Tests the servers in examples/streaming with real sources and clients on this machine.

scripts/test-streaming.sh runs them. GStreamer has to find the plugin.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import gi
import pytest

gi.require_version("Gst", "1.0")
gi.require_version("GstSdp", "1.0")
gi.require_version("GstWebRTC", "1.0")
from gi.repository import Gst, GstSdp, GstWebRTC  # noqa: E402

Gst.init(None)
EXAMPLES = Path(__file__).parents[2] / "examples" / "streaming"
# Rate and sizes of the clip and of the upscaled clip.
FPS, SMALL, LARGE = 15, (160, 90), (320, 180)
TS_SOURCE = (
    "videotestsrc is-live=true ! video/x-raw,width={},height={},framerate=15/1 ! {} ! mpegtsmux ! "
    "srtsink uri=srt://:{}?mode=listener wait-for-connection=false"
)
H264 = "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=15"
H264_DECODER = "h264parse ! avdec_h264 ! appsink name=video sync=false"
SRT_CLIENT = "srtsrc uri=srt://127.0.0.1:{} ! tsdemux ! " + H264_DECODER


def wait(condition, what, seconds=90):
    """Waits until the condition holds. The limit only ends a test that has failed."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"{what()}" if callable(what) else what
        time.sleep(0.05)
    return result


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Process:
    """A program whose output is collected."""

    def __init__(self, *command, env=None):
        self.log = open(os.memfd_create("log"), "w+b", buffering=0)
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL, env=env
        )

    def said(self):
        return os.pread(self.log.fileno(), 1 << 20, 0).decode()

    def wait_for(self, text):
        wait(lambda: text in self.said(), lambda: f"'{text}' in {self.said()}")

    def lives(self):
        return self.process.poll() is None

    def stop(self, number=signal.SIGTERM):
        """Ends the program and returns its exit status."""
        if self.lives():
            self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def run():
    processes = []

    def start(*command, env=None):
        processes.append(Process(*command, env=env))
        return processes[-1]

    yield start
    for process in processes:
        process.process.kill()
        process.process.wait()


@pytest.fixture
def serve(run):
    def start(name, *args, upscale="tadsrupscale scale=2", env=None):
        command = (sys.executable, EXAMPLES / name, "--upscale", upscale, "--retry", 1, "--latency", 200)
        return run(*command, *args, env=env)

    return start


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A video of 20 seconds with AAC."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    video = f"videotestsrc num-buffers={20 * FPS} ! video/x-raw,width=160,height=90,framerate={FPS}/1 ! {H264}"
    audio = "audiotestsrc wave=ticks num-buffers=860 ! audio/x-raw,rate=44100,channels=2 ! avenc_aac"
    sink = f"mp4mux name=mux ! filesink location={path}"
    command = f"{video} ! mux. {audio} ! mux. {sink}"
    subprocess.run(["gst-launch-1.0", "-q", *command.split()], check=True, timeout=300)
    return path


class Client:
    """Collects times and sizes of frames, and the audio, of a pipeline with appsinks."""

    def __init__(self, description):
        self.frames, self.audio = [], []
        self.pipeline = Gst.Pipeline.new(None)
        self.pipeline.add(Gst.parse_bin_from_description(description, False))
        for kind, collect in (("video", self.on_video), ("audio", self.on_audio)):
            sink = self.pipeline.get_by_name(kind)
            if sink:
                sink.set_property("emit-signals", True)
                sink.connect("new-sample", collect)
        self.pipeline.set_state(Gst.State.PLAYING)

    def on_video(self, sink):
        sample = sink.emit("pull-sample")
        caps = sample.get_caps().get_structure(0)
        size = (caps.get_value("width"), caps.get_value("height"))
        running = sample.get_segment().to_running_time(Gst.Format.TIME, sample.get_buffer().pts)
        self.frames.append((running / Gst.SECOND, size))
        return Gst.FlowReturn.OK

    def on_audio(self, sink):
        buffer = sink.emit("pull-sample").get_buffer()
        self.audio.append(buffer.extract_dup(0, buffer.get_size()))
        return Gst.FlowReturn.OK

    def wait(self, count, size=None):
        """Waits for more frames, of a size."""
        start = len(self.frames)
        matching = lambda: [frame for frame in self.frames[start:] if size in (None, frame[1])]  # noqa: E731
        wait(lambda: len(matching()) >= count, lambda: f"{count} frames of {size}; last: {self.frames[-3:]}")

    def stop(self):
        self.pipeline.set_state(Gst.State.NULL)


def rtsp_client(url):
    return Client(
        f"rtspsrc location={url} protocols=tcp latency=200 ! rtph264depay ! avdec_h264 ! appsink name=video sync=false"
    )


@pytest.fixture
def client():
    clients = []

    def start(description):
        clients.append(rtsp_client(description) if description.startswith("rtsp:") else Client(description))
        return clients[-1]

    yield start
    for each in clients:
        each.stop()


def metrics(port):
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("tadsr_")}


def assert_steady(frames, fps=FPS):
    """Checks that no frame is missing: times grow by one frame, up to the jitter of the network."""
    times = [time for time, _ in frames]
    steps = [b - a for a, b in zip(times, times[1:])]
    assert min(steps) > 0.2 / fps and max(steps) < 1.8 / fps, steps
    assert (times[-1] - times[0]) * fps == pytest.approx(len(steps), abs=1)


def test_rtsp_relays_each_frame_and_copies_the_audio_for_two_clients(serve, client, clip):
    source_port, port, metrics_port = free_port(), free_port(), free_port()
    source = serve("rtsp.py", f"clip={clip}", "--port", source_port, upscale="identity")
    source.wait_for("playing")
    url = f"rtsp://localhost:{source_port}/clip"
    server = serve("rtsp.py", f"first={url}", f"second={clip}", "--port", port, "--metrics", metrics_port)
    server.wait_for("first: playing")
    server.wait_for("second: playing")
    one = client(f"rtsp://localhost:{port}/first")
    one.wait(5)
    two = client(
        f"rtspsrc location=rtsp://localhost:{port}/first protocols=tcp latency=200 name=src "
        "src. ! rtph264depay ! avdec_h264 ! appsink name=video sync=false "
        "src. ! rtpmp4gdepay ! appsink name=audio sync=false"
    )
    other = client(f"rtsp://localhost:{port}/second")
    for each in (one, two, other):
        each.wait(3 * FPS, LARGE)
    for each in (one, two):
        # The first frames of a client come at once.
        assert_steady(each.frames[10:])
    original = Client(f"filesrc location={clip} ! qtdemux ! aacparse ! appsink name=audio sync=false")
    wait(lambda: len(two.audio) > 50 and len(original.audio) >= 860, "audio")
    assert set(two.audio[:50]) <= set(original.audio)
    original.stop()

    values = metrics(metrics_port)
    assert values['tadsr_frames_total{stream="first"}'] >= 3 * FPS
    assert values['tadsr_source_up{stream="first"}'] == values['tadsr_source_up{stream="second"}'] == 1
    assert values['tadsr_outputs{stream="first"}'] == 1, "two clients share one output"
    for name in ("mean", "p99"):
        assert values[f'tadsr_frame_seconds{{stream="first",value="{name}"}}'] > 0
    assert 'tadsr_frames_dropped_total{stream="first"}' in values
    assert server.stop() == 0
    assert source.stop(signal.SIGINT) == 0


def test_a_source_that_is_killed_and_returns_with_another_size_and_codec_reaches_the_same_client(serve, run, client):
    source_port, port = free_port(), free_port()
    start = lambda *args: run("gst-launch-1.0", "-q", *TS_SOURCE.format(*args, source_port).split())  # noqa: E731
    source = start(160, 90, H264)
    server = serve("rtsp.py", f"srt://127.0.0.1:{source_port}", "--port", port, "--timeout", 3)
    server.wait_for("playing")
    viewer = client(f"rtsp://localhost:{port}/upscaled")
    viewer.wait(FPS, (320, 180))
    source.stop(signal.SIGKILL)
    server.wait_for("trying again")
    start(192, 108, "x265enc speed-preset=ultrafast tune=zerolatency key-int-max=15 ! h265parse config-interval=-1")
    viewer.wait(FPS, (384, 216))
    times = [time for time, _ in viewer.frames]
    assert times == sorted(times)
    assert server.stop() == 0


def test_a_source_that_changes_its_size_in_the_stream_is_relayed(serve, client):
    source_port, port = free_port(), free_port()
    launch = TS_SOURCE.format(400, 300, f"videoscale ! capsfilter name=size ! {H264}", source_port)
    source = Gst.parse_launch(launch)

    def resize(width, height):
        caps = Gst.Caps.from_string(f"video/x-raw,width={width},height={height}")
        source.get_by_name("size").set_property("caps", caps)

    resize(160, 90)
    source.set_state(Gst.State.PLAYING)
    server = serve("srt.py", f"srt://127.0.0.1:{source_port}", "--to", f"srt://:{port}?mode=listener")
    server.wait_for("playing")
    viewer = client(SRT_CLIENT.format(port))
    viewer.wait(FPS, (320, 180))
    resize(128, 72)
    viewer.wait(FPS, (256, 144))
    assert "trying again" not in server.said()
    assert server.stop() == 0
    source.set_state(Gst.State.NULL)


def test_frames_that_are_too_late_are_dropped_and_counted(serve, clip):
    metrics_port = free_port()
    # Each frame takes three times as long as it may.
    slow = f"tadsrupscale scale=2 ! identity sleep-time={3 * 1_000_000 // FPS}"
    server = serve("rtsp.py", clip, "--port", free_port(), "--metrics", metrics_port, upscale=slow)
    server.wait_for("playing")
    wait(lambda: metrics(metrics_port)['tadsr_frames_dropped_total{stream="upscaled"}'] > 20, server.said)
    assert server.stop() == 0


def stalled_client(port, path="upscaled"):
    """Returns the connection of a client that starts to play and never reads."""
    connection = socket.create_connection(("localhost", port), timeout=30)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    url = f"rtsp://localhost:{port}/{path}"

    def request(method, target, headers=""):
        connection.sendall(f"{method} {target} RTSP/1.0\r\nCSeq: 1\r\n{headers}\r\n".encode())
        return connection.recv(65536).decode()

    request("DESCRIBE", url)
    answer = request("SETUP", f"{url}/stream=0", "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n")
    session = re.search(r"Session: (\w+)", answer)
    if not session:
        # The source is away.
        connection.close()
        return None
    connection.sendall(f"PLAY {url} RTSP/1.0\r\nCSeq: 2\r\nSession: {session[1]}\r\n\r\n".encode())
    return connection


def test_a_client_that_never_reads_does_not_stop_the_others(serve, client):
    port = free_port()
    server = serve("rtsp.py", "test", "--port", port, upscale="identity")
    server.wait_for("playing")
    url = f"rtsp://localhost:{port}/upscaled"
    viewer = client(url)
    viewer.wait(5)
    stalled = stalled_client(port)
    assert stalled
    # Far more than the buffers of the connection hold.
    viewer.wait(300)
    assert server.lives()
    client(url).wait(5)
    stalled.close()
    assert server.stop() == 0


@pytest.mark.parametrize("segments", ["ts", "fmp4"])
def test_hls_has_all_frames_of_a_file_and_is_served(serve, clip, tmp_path, client, segments):
    if segments == "fmp4" and not Gst.ElementFactory.find("hlscmafsink"):
        pytest.skip("hlscmafsink is not installed")
    port = free_port()
    # The file plays in real time.
    args = ("--once", "--folder", tmp_path, "--port", port, "--segment", 2, "--segments", segments)
    server = serve("hls.py", clip, *args)
    server.wait_for("playing")
    playlist = "video.m3u8" if segments == "fmp4" else "playlist.m3u8"
    extension = ".m4s" if segments == "fmp4" else ".ts"

    def fetch(name):
        try:
            return urllib.request.urlopen(f"http://localhost:{port}/{name}", timeout=10).read().decode()
        except urllib.error.HTTPError:
            return ""

    wait(lambda: fetch(playlist).count(extension) >= 2, server.said)
    if segments == "fmp4":
        assert "video.m3u8" in fetch("playlist.m3u8") and "audio.m3u8" in fetch("playlist.m3u8")
    assert wait(lambda: not server.lives(), server.said) and server.stop() == 0, server.said()

    def written(playlist):
        """Returns the segments of a complete playlist, and joins them in a file."""
        lines = (tmp_path / playlist).read_text().splitlines()
        assert "#EXT-X-ENDLIST" in lines
        names = [line for line in lines if line.endswith(extension)]
        stem = "" if segments == "ts" else playlist.removesuffix(".m3u8")
        assert names == sorted(path.name for path in tmp_path.glob(f"{stem}[0-9]*{extension}"))
        header = [line.split('"')[1] for line in lines if line.startswith("#EXT-X-MAP")]
        joined = tmp_path / f"{playlist}{extension}"
        joined.write_bytes(b"".join((tmp_path / name).read_bytes() for name in header + names))
        return names, joined

    names, video = written(playlist)
    demux = "qtdemux" if segments == "fmp4" else "tsdemux"
    viewer = client(f"filesrc location={video} ! {demux} ! {H264_DECODER}")
    bus = viewer.pipeline.get_bus()
    assert (
        bus.timed_pop_filtered(60 * Gst.SECOND, Gst.MessageType.EOS | Gst.MessageType.ERROR).type == Gst.MessageType.EOS
    )
    assert len(viewer.frames) == 20 * FPS
    assert {size for _, size in viewer.frames} == {LARGE}
    assert_steady(viewer.frames)
    if segments == "fmp4":
        _, audio = written("audio.m3u8")
        original = client(f"filesrc location={clip} ! qtdemux ! aacparse ! appsink name=audio sync=false")
        copied = client(f"filesrc location={audio} ! qtdemux ! aacparse ! appsink name=audio sync=false")
        wait(lambda: len(original.audio) >= 860 and len(copied.audio) > 850, lambda: len(copied.audio))
        assert set(copied.audio) <= set(original.audio)


def test_srt_sends_to_two_clients(serve, client, clip):
    port = free_port()
    server = serve("srt.py", clip, "--to", f"srt://:{port}?mode=listener")
    server.wait_for("playing")
    one, two = client(SRT_CLIENT.format(port)), client(SRT_CLIENT.format(port))
    for each in (one, two):
        each.wait(2 * FPS, LARGE)
        assert_steady(each.frames[10:])
    assert server.stop() == 0


def test_webrtc_shows_video_and_audio_to_two_clients(serve, client, clip):
    port = free_port()
    server = serve("webrtc.py", clip, "--port", port)
    server.wait_for("playing")
    for path, content in [("", "webrtc.js"), ("webrtc.js", "RTCPeerConnection")]:
        assert content in urllib.request.urlopen(f"http://localhost:{port}/{path}", timeout=10).read().decode()

    def post(path, body=b""):
        return urllib.request.urlopen(f"http://localhost:{port}/{path}", data=body, timeout=40).read().decode()

    with pytest.raises(urllib.error.HTTPError) as error:
        post("answer/none", b"v=0")
    assert error.value.code == 400

    def connect():
        offer = json.loads(post("offer"))
        viewer = client("webrtcbin name=peer bundle-policy=max-bundle")
        peer = viewer.pipeline.get_by_name("peer")
        bin = peer.get_parent()

        def on_pad(_, pad):
            if pad.get_direction() != Gst.PadDirection.SRC:
                return
            caps = pad.get_current_caps().get_structure(0)
            if caps.get_value("media") == "video":
                chain, collect = "rtph264depay ! avdec_h264", viewer.on_video
            else:
                chain, collect = "rtpopusdepay ! opusdec", viewer.on_audio
            part = Gst.parse_bin_from_description(f"{chain} ! appsink name=end emit-signals=true sync=false", True)
            part.get_by_name("end").connect("new-sample", collect)
            bin.add(part)
            part.sync_state_with_parent()
            pad.link(part.get_static_pad("sink"))

        peer.connect("pad-added", on_pad)
        _, message = GstSdp.SDPMessage.new_from_text(offer["sdp"])
        description = GstWebRTC.WebRTCSessionDescription.new(GstWebRTC.WebRTCSDPType.OFFER, message)
        for name, value in (("set-remote-description", description), ("create-answer", None)):
            promise = Gst.Promise.new()
            peer.emit(name, value, promise)
            promise.wait()
        reply = promise.get_reply()
        peer.emit("set-local-description", reply.get_value("answer"), Gst.Promise.new())
        complete = GstWebRTC.WebRTCICEGatheringState.COMPLETE
        wait(lambda: peer.get_property("ice-gathering-state") == complete, "addresses")
        post(f"answer/{offer['id']}", peer.get_property("local-description").sdp.as_text().encode())
        return viewer

    viewers = [connect(), connect()]
    for viewer in viewers:
        viewer.wait(2 * FPS, LARGE)
        wait(lambda: len(viewer.audio) > 20, "audio")
    assert server.stop() == 0


@pytest.mark.parametrize(
    "source, message",
    [
        ("rtsp://localhost:1/none", "rtsp"),
        ("srt://127.0.0.1:1", "no video from srt://127.0.0.1:1"),
        ("/dev/video99", "/dev/video99"),
        ("rtsp://user:secret@localhost:1/none", "trying again"),
    ],
)
def test_a_source_that_cannot_be_reached_is_named_and_tried_again(serve, source, message):
    server = serve("rtsp.py", source, "--port", free_port(), "--timeout", 3)
    server.wait_for("trying again")
    assert message.lower() in server.said().lower()
    assert "secret" not in server.said()
    assert server.lives()
    assert server.stop() == 0


def test_files_without_video_are_named_and_tried_again(serve, tmp_path):
    sound = tmp_path / "sound.wav"
    command = f"audiotestsrc num-buffers=100 ! wavenc ! filesink location={sound}"
    subprocess.run(["gst-launch-1.0", "-q", *command.split()], check=True, timeout=300)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video" * 1000)
    server = serve("rtsp.py", f"a={sound}", f"b={broken}", "--port", free_port())
    server.wait_for("sound.wav has no video")
    server.wait_for("b: ")
    assert server.lives() and server.stop() == 0
    once = serve("hls.py", broken, "--once", "--folder", tmp_path, "--port", 0)
    assert once.process.wait(30) == 1 and "hls: " in once.said(), once.said()


@pytest.mark.parametrize("name", ["rtsp.py", "hls.py", "webrtc.py", "compare.py"])
def test_a_port_in_use_is_an_error(serve, name):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = serve(name, "test", "--port", port)
        assert server.process.wait(30) == 1
        assert f"port {port}" in server.said()


def test_srt_waits_for_a_port_in_use(serve, client):
    port = free_port()
    first = serve("srt.py", "test", "--to", f"srt://:{port}?mode=listener")
    first.wait_for("playing")
    time.sleep(1)
    second = serve("srt.py", "test", "--to", f"srt://:{port}?mode=listener")
    second.wait_for("trying again")
    first.stop()

    viewers = []

    # A client that connects too early fails.
    def receives():
        viewers.append(client(SRT_CLIENT.format(port)))
        time.sleep(3)
        return any(len(viewer.frames) > 10 for viewer in viewers)

    wait(receives, second.said)
    assert second.stop() == 0


@pytest.mark.parametrize(
    "args, message",
    [
        (["nosuch.mp4"], "'nosuch.mp4' is neither a file nor a URI"),
        (["a=test", "a=test"], "two sources have the name 'a'"),
        (["rtsp://localhost:{port}/upscaled"], "is this server itself"),
        (["test", "--encoder", "nosuchenc"], "nosuchenc"),
        (["test", "--upscale", "nosuchfilter"], "nosuchfilter"),
    ],
)
def test_wrong_arguments_are_errors(run, args, message):
    port = free_port()
    args = [arg.format(port=port) for arg in args]
    server = run(sys.executable, EXAMPLES / "rtsp.py", *args, "--port", port)
    assert server.process.wait(30) != 0
    assert message in server.said() and "Traceback" not in server.said()


@pytest.mark.parametrize(
    "name, missing, message",
    [
        ("rtsp.py", ["x264", "openh264"], "gstreamer1.0-plugins-ugly"),
        ("hls.py", ["hlssink3"], "--segments fmp4 needs hlscmafsink"),
        ("hls.py", ["fmp4"], "--segments fmp4 needs "),
    ],
)
def test_a_missing_element_is_named(serve, tmp_path, name, missing, message):
    system = subprocess.run(
        ["pkg-config", "--variable=pluginsdir", "gstreamer-1.0"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for folder in [system, *os.environ["GST_PLUGIN_PATH"].split(":")]:
        for plugin in Path(folder).glob("*.so"):
            if not any(part in plugin.name for part in missing):
                (tmp_path / plugin.name).symlink_to(plugin.resolve())
    paths = {"GST_PLUGIN_SYSTEM_PATH": str(tmp_path), "GST_PLUGIN_PATH": "", "GST_REGISTRY": str(tmp_path / "registry")}
    env = {**os.environ, **paths}
    more = ["--segments", "fmp4"] if name == "hls.py" else []
    server = serve(name, "test", "--port", free_port(), *more, env=env)
    assert server.process.wait(60) == 1
    assert message in server.said()


@pytest.mark.parametrize("name", ["rtsp.py", "hls.py", "srt.py", "webrtc.py", "compare.py"])
def test_help_has_examples(run, name):
    shown = run(sys.executable, EXAMPLES / name, "--help")
    assert shown.process.wait(30) == 0
    assert f"{name} test" in shown.said() and "--upscale" in shown.said()
