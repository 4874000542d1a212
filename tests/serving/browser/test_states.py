"""What the page says and does when something is in the way, with a keyboard, and on a phone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lavatar_jax.serving import sessions
from lavatar_jax.serving.state import SavedRooms
from tests.serving.browser.chromium import DESKTOP, PHONE, Page
from tests.serving.browser.conftest import Puppets
from tests.serving.browser.puppet import PuppetHost
from tests.serving.browser.test_talking import LIVE, SETUP, stop
from tests.serving.browser.watching import frame_ages, no_overflow
from tests.serving.conftest import KEY, wait_for

Make = Callable[..., Puppets]
VEIL = "document.getElementById('veil').hidden ? '' : document.getElementById('veil-text').innerText"
NOTICE = "document.getElementById('notice').hidden ? '' : document.getElementById('notice-text').innerText"


def says(where: str, words: str) -> str:
    return f"({where}).includes({json.dumps(words)})"


def begin(page: Page, puppets: Puppets, query: str = "") -> None:
    page.open(puppets.url + query)
    page.wait(SETUP)
    page.click("#start")
    page.wait(LIVE)


def test_setup_in_every_size_and_light(page: Page, puppets: Make) -> None:
    served = puppets()
    for size, name in ((DESKTOP, "desktop"), (PHONE, "phone"), ((320, 640), "narrow")):
        for dark in (False, True):
            page.open(served.url, size, dark=dark, still=True)
            page.wait("document.getElementById('status').innerText === 'Ready'")
            page.wait("[...document.images].every((image) => image.complete && image.naturalWidth)")
            assert no_overflow(page)
            page.screenshot(f"setup-{name}-{'dark' if dark else 'light'}")
    assert not page.evaluate("document.getElementById('badge').checkVisibility()")  # no avatar yet


def test_busy_server(page: Page, puppets: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions.BUSY, "retry_after", 2)
    served = puppets(reconnect=300.0)  # nobody will connect to the session that takes the place
    served.client.post("/v1/sessions", json={}).raise_for_status()
    page.open(served.url)
    page.wait(SETUP)
    page.click("#start")
    page.wait(says(VEIL, "Every place is taken"))
    page.wait("document.getElementById('veil-count').innerText === 'Trying again in 1 s'")
    page.screenshot("busy")
    page.click("#veil-cancel")
    page.wait(SETUP)
    page.click("#start")
    page.wait(says(VEIL, "Every place is taken"))
    served.run(served.room.stop("closed"))
    page.wait(LIVE)
    page.complaints.clear()  # the browser notes each 503
    stop(page)


def test_a_server_that_still_compiles(page: Page, puppets: Make) -> None:
    served = puppets()
    served.sessions.ready = False
    page.open(served.url)
    page.wait("document.getElementById('status').innerText.includes('being compiled')")
    page.click("#start")
    page.wait(says(VEIL, "being compiled"))
    page.screenshot("starting")
    served.sessions.ready = True
    page.wait(LIVE)
    page.complaints.clear()
    stop(page)


def test_no_permission_for_the_microphone(page: Page, puppets: Make) -> None:
    refusal = "async () => { throw new DOMException('', 'NotAllowedError') }"
    page.before_loading(f"navigator.mediaDevices.getUserMedia = {refusal}")
    served = puppets()
    begin(page, served)
    assert "microphone is blocked" in page.evaluate(NOTICE)
    assert page.evaluate("document.getElementById('mute').getAttribute('aria-pressed')") == "false"
    page.show(PHONE)
    assert no_overflow(page)
    page.screenshot("no-microphone-phone")
    page.click("#notice-close")
    assert page.evaluate(NOTICE) == ""
    assert "no text-to-speech" in page.text("#talk-hint")
    stop(page)


def test_a_picture_of_ones_own_needs_consent(page: Page, puppets: Make, tmp_path: Path) -> None:
    served = puppets()
    colours = np.zeros((300, 600, 3), np.uint8)
    colours[:, 300:] = (250, 220, 40)
    Image.fromarray(colours).save(tmp_path / "me.png")
    page.before_loading(
        "const make = URL.createObjectURL; URL.createObjectURL = (blob) => make((window.picture = blob))"
    )
    page.open(served.url)
    page.wait(SETUP)
    page.choose_file("#picture", tmp_path / "me.png")
    page.wait("document.getElementById('crop').open")
    page.show(PHONE, dark=True)
    assert no_overflow(page)
    page.screenshot("crop-phone-dark")
    page.show(DESKTOP)
    for _ in range(20):  # the picture to the left, as far as it goes
        page.key("ArrowLeft")
    page.click("#crop-use")
    assert "consent" in page.text("#crop-problem")
    page.screenshot("crop-without-consent")
    page.key(" ")  # the focus is where it is missing
    page.click("#consent-name")
    page.type("Ada")
    page.key("Enter")
    page.wait("!document.getElementById('crop').open && document.querySelector('input[value=own]')?.checked")
    page.screenshot("own-picture")
    page.click("#start")
    page.wait(LIVE)
    (line,) = (served.data / "consent.jsonl").read_text().splitlines()
    stated = json.loads(line)
    assert stated["name"] == "Ada"
    sent = page.evaluate(
        "window.picture.arrayBuffer().then((data) => crypto.subtle.digest('SHA-256', data))"
        ".then((hash) => [...new Uint8Array(hash)])"
    )
    assert bytes(sent).hex() == stated["image_sha256"]
    seen = page.evaluate(
        "(() => { const c = document.createElement('canvas'); const b = c.getContext('2d');"
        "b.drawImage(document.getElementById('video'), 0, 0, 8, 8);"
        "return [...b.getImageData(1, 1, 1, 1).data] })()"
    )
    assert np.abs(np.array(seen[:3]) - (250, 220, 40)).max() < 40  # only the yellow half was used
    stop(page)


def test_a_file_that_is_no_picture(page: Page, puppets: Make, tmp_path: Path) -> None:
    (tmp_path / "me.png").write_text("nothing to see")
    page.open(puppets().url)
    page.wait(SETUP)
    page.choose_file("#picture", tmp_path / "me.png")
    page.wait(says(NOTICE, "not a picture"))


@pytest.mark.parametrize("media", ["webrtc", "ws"])
def test_a_lost_connection_comes_back(page: Page, puppets: Make, media: str) -> None:
    served = puppets()
    begin(page, served, f"/?media={media}")
    room = served.room
    (before,) = room.connections
    if media == "ws":
        served.run(served.cut())
    else:
        served.run(before._peer.close())
    wait_for(lambda: room.connections and room.connections != [before])
    page.wait("document.getElementById('veil').hidden")
    assert served.room is room
    page.complaints.clear()
    stop(page)


def test_a_line_that_falls_silent_is_replaced(page: Page, puppets: Make) -> None:
    served = puppets()
    begin(page, served)
    page.click("#mute")
    room = served.room
    (before,) = room.connections
    before.tell = before._verbs.tell = lambda event: None  # nothing is closed, and nothing is told
    # The page says that the connection is lost, but the next one may stand before anybody has read it.
    wait_for(lambda: room.connections and before not in room.connections, 30)
    page.wait("document.getElementById('veil').hidden")
    assert served.room is room
    stop(page)


# The first frame is on the screen before the page hears that the data channel is open; from then on the page
# waits for a first frame for 0.5 s only.
FRAME_FIRST = """
const isShown = () => document.getElementById("screen").dataset.shows === "video";
const make = RTCPeerConnection.prototype.createDataChannel;
RTCPeerConnection.prototype.createDataChannel = function (...about) {
  const channel = make.apply(this, about);
  const { get } = Object.getOwnPropertyDescriptor(RTCDataChannel.prototype, "readyState");
  let late = false;
  Object.defineProperty(channel, "readyState", { get: () => (late ? get.call(channel) : "connecting") });
  const timer = setInterval(() => {
    if (get.call(channel) !== "open" || !isShown()) return;
    clearInterval(timer);
    late = window.wasLate = true;
    channel.dispatchEvent(new Event("open"));
  }, 50);
  return channel;
};
const later = window.setTimeout;
window.setTimeout = (call, time, ...about) => {
  const isFirstFrame = time === 6000;
  window.wasShortened ||= isFirstFrame;
  return later(call, isFirstFrame ? 500 : time, ...about);
};
"""


def test_a_frame_before_the_data_channel_counts(page: Page, puppets: Make) -> None:
    page.before_loading(FRAME_FIRST)
    served = puppets()
    begin(page, served)
    page.wait("window.wasLate && window.wasShortened")
    (before,) = served.room.connections
    time.sleep(1.5)
    page.evaluate("true")  # takes note of what was asked for
    assert served.room.connections == [before]
    assert not [url for url in page.requests if url.startswith("ws")]
    stop(page)


@pytest.mark.parametrize("media", ["webrtc", "ws"])
def test_the_age_of_a_frame_on_the_screen(page: Page, puppets: Make, media: str) -> None:
    served = puppets(PuppetHost(stamped=True))
    begin(page, served, f"/?media={media}")
    ages = frame_ages(page)
    print(f"{media}: median {np.median(ages):.0f} ms, 95 % {np.quantile(ages, 0.95):.0f} ms")
    assert np.median(ages) < 1000  # 80 ms: the server's store; 120 ms: that of the page for WebSockets
    stop(page)


@pytest.mark.parametrize("media", ["webrtc", "ws"])
def test_a_reloaded_page_is_heard_as_it_shows(page: Page, puppets: Make, media: str) -> None:
    """The server remembers that the page before was muted."""
    served = puppets()
    pressed = "document.getElementById('mute').getAttribute('aria-pressed')"
    begin(page, served, f"/?media={media}")
    wait_for(lambda: not served.room.voice.muted)
    page.click("#mute")
    wait_for(lambda: served.room.voice.muted)
    assert page.evaluate(pressed) == "false"
    page.evaluate("window.isOld = true")
    page.command("Page.reload")
    page.wait("!window.isOld")
    page.wait(LIVE)
    page.wait(f"{pressed} === 'true'")
    wait_for(lambda: not served.room.voice.muted)
    stop(page)


def test_a_text_may_take_long(page: Page, puppets: Make) -> None:
    """As long as the server takes: the page would say it again."""
    served = puppets()
    speak = lambda text, voice: np.full(16_000, 0.1, np.float32)  # noqa: E731
    served.services.speech.tts = SimpleNamespace(name="puppet", voices=("one",), speak=speak)
    page.before_loading(
        "const ask = fetch; window.fetch = (path, about) => "
        "{ if (path.endsWith('/speak')) window.asked = about; return ask(path, about); }"
    )
    begin(page, served)
    page.click("#text")
    page.type("Hello")
    page.key("Enter")
    page.wait("window.asked !== undefined")
    assert page.evaluate("window.asked.signal === undefined")
    stop(page)


def test_a_server_that_is_gone(page: Page, puppets: Make) -> None:
    served = puppets(reconnect=8.0)
    begin(page, served, "/?media=ws")
    served.run(served.vanish())
    page.wait(says(VEIL, "connection is lost"))
    page.screenshot("lost")
    page.show(PHONE, dark=True)
    page.screenshot("lost-phone-dark")
    page.wait(says(NOTICE, "did not come back"))
    page.wait(SETUP)
    page.show(DESKTOP)
    page.screenshot("gone")
    page.complaints.clear()  # the browser notes each failed request


@pytest.mark.parametrize("media", ["webrtc", "ws"])
def test_a_server_that_restarts(
    page: Page, puppets: Make, tmp_path: Path, media: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page waits for it, however long that takes, and goes on with its session."""
    served = puppets(state=tmp_path / "state", reconnect=8.0)
    begin(page, served, f"/?media={media}")
    name = served.room.identity.id
    page.click("#record")
    wait_for(lambda: served.room.recording and served.room.recording.bytes)
    page.wait("document.getElementById('record').getAttribute('aria-pressed') === 'true'")
    served.stop()
    page.wait(says(VEIL, "The server restarts"))
    page.screenshot("restart")
    page.wait("!document.getElementById('recording').hidden")  # what was recorded has been fetched
    going_on, restore = threading.Event(), SavedRooms.restore
    monkeypatch.setattr(SavedRooms, "restore", lambda self, host: going_on.wait(60) and restore(self, host))
    port = int(served.url.rsplit(":")[-1])
    again = puppets(ready=False, port=port, state=tmp_path / "state", reconnect=8.0)
    if media == "ws":  # a page that was not told knows it from the new server
        page.evaluate("window.isOld = true")
        page.command("Page.reload")
        page.wait("!window.isOld")
    time.sleep(9.0)
    page.wait(says(VEIL, "The server restarts"))
    going_on.set()
    page.wait("document.getElementById('veil').hidden")
    page.wait(LIVE)
    assert again.room.identity.id == name
    assert again.room.connections
    page.complaints.clear()
    stop(page)


def test_a_server_that_stops_says_so(page: Page, puppets: Make) -> None:
    served = puppets()
    begin(page, served)
    served.server.should_exit = True
    page.wait(says(NOTICE, "The server stops."))
    page.wait(SETUP)
    page.complaints.clear()


def test_key_of_the_server(page: Page, puppets: Make) -> None:
    served = puppets(api_key=KEY)
    page.open(served.url)
    page.wait(SETUP)
    page.click("#start")
    page.wait(says(NOTICE, "API key"))
    assert page.evaluate("document.activeElement.id") == "key"
    page.screenshot("key")
    page.type(KEY)
    page.key("Enter")
    page.wait(LIVE)
    page.complaints.clear()
    stop(page)


def test_everything_by_keyboard(page: Page, puppets: Make) -> None:
    served = puppets()
    page.open(served.url)
    page.wait(SETUP)

    def tab_to(name: str) -> None:
        for _ in range(30):
            page.key("Tab")
            if page.evaluate("document.activeElement.id || document.activeElement.name") == name:
                return
        raise AssertionError(f"{name} is not reached")

    tab_to("face")
    page.key("ArrowRight")
    assert page.evaluate("document.activeElement.value") == "amira"
    page.screenshot("focus-face")
    tab_to("start")
    page.key("Enter")
    page.wait(LIVE)
    assert served.room.identity.face == "amira"
    page.wait("document.activeElement.id === 'mute'")
    page.screenshot("focus-microphone")
    page.key("m")
    page.wait("document.getElementById('mute').getAttribute('aria-pressed') === 'false'")
    wait_for(lambda: served.room.voice.muted)
    page.key("Escape")
    wait_for(lambda: served.host.opened[0].interrupts)
    tab_to("sound")
    page.key(" ")
    page.wait("document.getElementById('video').muted")
    tab_to("stop")
    page.key("Enter")
    page.wait(SETUP)
    assert page.evaluate("document.activeElement.id") == "start"


def test_every_control_has_a_name(page: Page, puppets: Make) -> None:
    page.open(puppets().url)
    page.wait(SETUP)
    page.command("Accessibility.enable")
    nodes = page.command("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "checkbox", "radio", "textbox", "slider", "combobox", "link", "image")
    found = [node for node in nodes if node.get("role", {}).get("value") in roles and not node.get("ignored")]
    assert len(found) > 10
    nameless = [node["role"]["value"] for node in found if not node.get("name", {}).get("value")]
    assert not nameless


def test_a_call_by_way_of_turn(page: Page, puppets: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Browsers throw where a TURN server comes without credentials."""
    monkeypatch.setenv("LAVATAR_TURN_USERNAME", "avatar")
    monkeypatch.setenv("LAVATAR_TURN_CREDENTIAL", "secret")
    page.before_loading(
        "const Peer = RTCPeerConnection; window.RTCPeerConnection = class extends Peer "
        "{ constructor(about) { super(about); window.used = this.getConfiguration().iceServers; } }"
    )
    served = puppets(ice_servers=("turn:127.0.0.1:9",))
    begin(page, served, "/?media=webrtc")
    assert page.evaluate("window.used[0].username") == "avatar"
    stop(page)
