"""Tests compare.py and its page with Chromium and Playwright, which scripts/test-streaming.sh installs."""

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_streaming import EXAMPLES, free_port, run, serve, wait  # noqa: F401

# A moving pattern with sharp edges.
SOURCE = (
    "testbin://video,pattern=checkers-8,horizontal-speed=3,is-live=true,"
    "caps=[video/x-raw,width=160,height=90,framerate=10/1]"
)
UPSCALE = "tadsrupscale scale=2 model=tiny overload=drop"


def test_the_page_shows_both_halves_of_a_frame_and_its_dials_act(run):  # noqa: F811
    port = free_port()
    # A network that is slower than the source.
    slow = (
        f"import sys; sys.path.insert(0, '{EXAMPLES}'); import compare; "
        "compare.COMPARE = compare.COMPARE.replace('! both.sink_1', '! identity sleep-time=100000 ! both.sink_1'); "
        "compare.main()"
    )
    server = run(sys.executable, "-c", slow, SOURCE, "--port", port, "--upscale", UPSCALE, "--timeout", 60)
    server.wait_for("playing")
    screenshots = os.environ.get("TADSR_SCREENSHOTS", "")
    browser = run("node", Path(__file__).with_name("compare.js"), f"http://localhost:{port}/", screenshots)
    wait(lambda: not browser.lives(), browser.said, 600)
    assert browser.process.returncode == 0, browser.said()
    assert server.lives() and "Traceback" not in server.said(), server.said()
    assert server.stop() == 0


@pytest.mark.parametrize("source", [SOURCE, "rtsp://localhost:1/none"])
def test_dials_that_are_refused_change_nothing_and_the_server_lives_on(serve, source):  # noqa: F811
    port = free_port()
    server = serve("compare.py", source, "--port", port, upscale=UPSCALE)
    server.wait_for("playing" if source == SOURCE else "trying again")

    def request(path, body=None):
        return urllib.request.urlopen(f"http://localhost:{port}/{path}", data=body, timeout=30).read().decode()

    before = json.loads(request("state"))
    for body, message in [
        (b'{"denoise": 2}', "denoise must be a number from -1 to 1"),
        (b'{"strength": 0.5, "detail": "much"}', "detail must be a number from 0 to 1"),
        (b'{"detail": NaN}', "detail must be a number"),
        (b'{"detail": true}', "detail must be a number"),
        (b'{"model": "/etc/passwd"}', "the model must be one of auto, tiny, small"),
        (b'{"model": ["tiny"]}', "the model must be one of"),
        (b'{"threads": 1}', "the dials are model, denoise, detail, strength"),
        (b"[1]", "dials are an object"),
        (b"not JSON", "Expecting value"),
        (b"[" * 100_000, "recursion"),
    ]:
        with pytest.raises(urllib.error.HTTPError) as error:
            request("dials", body)
        assert error.value.code == 400 and message in error.value.read().decode()
    state = json.loads(request("state"))
    assert state["dials"] == before["dials"] == {"model": "tiny", "denoise": -1, "detail": 0.5, "strength": 1}
    assert state["playing"] == (source == SOURCE)
    assert state["playing"] or state["reason"] in server.said()
    request("dials", b'{"model": "small", "denoise": 0.25}')
    assert json.loads(request("state"))["dials"]["denoise"] == 0.25
    assert server.lives() and "Traceback" not in server.said(), server.said()
    assert server.stop() == 0


def test_an_element_without_the_dials_is_an_error(serve):  # noqa: F811
    server = serve("compare.py", "test", "--port", free_port(), upscale="identity")
    assert server.process.wait(60) == 1
    assert '"strength"' in server.said() and "Traceback" not in server.said()
