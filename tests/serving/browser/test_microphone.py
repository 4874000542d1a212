"""The page's microphone: asked for once, and off whenever nobody wants it."""

from __future__ import annotations

from collections.abc import Callable

from tests.serving.browser.chromium import Page
from tests.serving.browser.conftest import Puppets
from tests.serving.browser.test_states import NOTICE, VEIL, begin, says
from tests.serving.browser.test_talking import LIVE, SETUP, stop

Make = Callable[..., Puppets]
# The browser asks until `allow` is called; what it has given is kept, to see whether it is still on.
ASKS = """
window.asked = 0;
window.tracks = [];
window.contexts = [];
window.allowed = new Promise((resolve) => (window.allow = resolve));
const give = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
navigator.mediaDevices.getUserMedia = async (wanted) => {
  window.asked++;
  await window.allowed;
  const stream = await give(wanted);
  window.tracks.push(...stream.getTracks());
  return stream;
};
const Context = AudioContext;
window.AudioContext = class extends Context {
  constructor(...about) {
    super(...about);
    window.contexts.push(this);
  }
};
"""
PRESSED = "document.getElementById('mute').getAttribute('aria-pressed') === 'true'"
ALL_OFF = (
    "window.tracks.length > 0 && window.tracks.every((track) => track.readyState === 'ended')"
    " && window.contexts.every((context) => context.state === 'closed')"
)


def begin_without_an_answer(page: Page, puppets: Puppets) -> None:
    page.before_loading(ASKS)
    page.open(puppets.url)
    page.wait(SETUP)
    page.click("#start")
    page.wait(says(VEIL, "Your browser asks"))
    page.click("#veil-cancel")
    page.wait(LIVE)


def test_a_microphone_that_is_wanted_twice_is_opened_once(page: Page, puppets: Make) -> None:
    begin_without_an_answer(page, puppets())
    page.click("#mute")
    page.click("#mute")
    page.evaluate("window.allow()")
    page.wait(PRESSED)
    assert page.evaluate("window.asked") == 1
    stop(page)
    page.wait(ALL_OFF)
    page.click("#start")  # the next one is its own
    page.wait(LIVE)
    page.wait(PRESSED)
    assert page.evaluate("window.asked") == 2
    stop(page)


def test_an_answer_after_the_end_switches_nothing_on(page: Page, puppets: Make) -> None:
    """Also when a session runs by then that was to have no microphone."""
    served = puppets()
    begin_without_an_answer(page, served)
    stop(page)
    page.click("#use-microphone")
    page.click("#start")
    page.wait(LIVE)
    page.evaluate("window.allow()")
    page.wait(ALL_OFF)
    assert not page.evaluate(PRESSED)
    assert served.room.voice.muted
    stop(page)


def test_a_microphone_that_cannot_be_heard_is_off(page: Page, puppets: Make) -> None:
    page.before_loading(ASKS + "window.allow();")
    page.before_loading(
        "const add = AudioWorklet.prototype.addModule;"
        "AudioWorklet.prototype.addModule = async () => { throw new DOMException('', 'AbortError') };"
        "window.mend = () => (AudioWorklet.prototype.addModule = add);"
    )
    begin(page, puppets(), "/?media=webrtc")
    assert "microphone does not work" in page.evaluate(NOTICE)
    page.wait(ALL_OFF)
    assert not page.evaluate(PRESSED)
    page.evaluate("window.mend()")
    page.click("#mute")
    page.wait(PRESSED)
    stop(page)
    page.wait(ALL_OFF)
