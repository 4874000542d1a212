"""The first user's way: the page of `serve.py live`, a voice in the microphone, a face that says it."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from lavatar_jax.inference.generate import SAMPLES
from tests.programs import need_program
from tests.serving.browser.chromium import DESKTOP, PHONE, Page
from tests.serving.browser.watching import no_overflow, note, noted, watch_mouth
from tests.serving.conftest import wait_for

LIVE = "document.body?.dataset.state === 'live'"
SETUP = "document.body.dataset.state === 'setup' && !document.getElementById('start').disabled"
SPEAKS = "'speaking' in document.getElementById('screen').dataset"


def start(page: Page, address: str, face: str = "jo") -> None:
    page.open(address)
    page.wait(SETUP)
    page.click(f"input[value={face}] + img")
    page.click("#start")
    page.wait(LIVE, 30)


def stop(page: Page) -> None:
    page.click("#stop")
    page.wait(SETUP)


@pytest.mark.parametrize("media", ["webrtc", "ws"])
def test_the_mouth_follows_the_microphone(page: Page, live: str, media: str) -> None:
    start(page, f"{live}/?media={media}")
    page.wait(SPEAKS)
    spoken, silent = watch_mouth(page, 10)
    print(f"{media}: the mouth is {spoken:.1f} from its rest in speech, {silent:.1f} in pauses")
    assert spoken > 2.0 * silent, (spoken, silent)
    assert spoken > 4, (spoken, silent)
    page.evaluate("document.getElementById('costs').open = true")
    page.wait("document.getElementById('parts').children.length > 10")
    assert float(page.text("#numbers dd").split()[0]) > 10
    assert page.evaluate("document.getElementById('badge').checkVisibility()")
    for size, name in ((DESKTOP, "desktop"), (PHONE, "phone")):
        for dark in (False, True):
            page.show(size, dark=dark)
            assert no_overflow(page)
            page.screenshot(f"live-{media}-{name}-{'dark' if dark else 'light'}")
    page.show(DESKTOP)
    stop(page)


def test_a_file_is_said_recorded_and_interrupted(page: Page, live: str) -> None:
    page.open(live)
    page.wait(SETUP)
    page.click("#use-microphone")
    page.click("#start")
    page.wait(LIVE, 30)
    page.click("#record")
    page.choose_file("#file", SAMPLES / "voice.flac")
    page.wait(SPEAKS)
    page.wait("document.getElementById('recorded-time').innerText >= '0:02'")
    page.screenshot("recording")
    note(page)
    page.key("Escape")
    page.wait(noted("Interrupted"))
    page.wait(f"!({SPEAKS})")
    page.click("#record")
    page.wait("document.getElementById('playback').readyState >= 2")
    page.click("#download")
    (file,) = wait_for(lambda: list(page.downloads.glob("avatar.mp4")))
    sound, frames = decode(file)
    assert len(frames) >= 25
    assert frames[0].shape == (512, 512, 3)
    assert np.sqrt(np.mean(sound**2)) > 0.01
    assert loud_seconds(sound, 48_000) < 0.8 * loud_seconds(*soundfile.read(SAMPLES / "voice.flac"))
    page.evaluate("document.getElementById('playback').play()")
    page.wait("document.getElementById('playback').currentTime > 0.3")
    stop(page)
    page.screenshot("recorded")


def decode(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """The sound and the pictures of a video."""
    with av.open(path) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    with av.open(path) as file:
        sound = np.concatenate([frame.to_ndarray().ravel() for frame in file.decode(audio=0)])
    return sound, frames


def loud_seconds(sound: np.ndarray, rate: int) -> float:
    pieces = sound[: len(sound) // 1000 * 1000].reshape(-1, 1000)
    return 1000 / rate * float(np.sum(np.sqrt(np.mean(pieces**2, axis=1)) > 0.01))


def test_a_text_is_spoken(page: Page, live: str) -> None:
    need_program("flite", "flite")
    page.open(live)
    page.wait(SETUP)
    page.click("#use-microphone")
    page.click("#start")
    page.wait(LIVE, 30)
    note(page)
    page.click("#text")
    page.type("Hello, who are you?")
    page.key("Enter")
    page.wait(noted("(speaks)"))
    assert page.evaluate("document.getElementById('text').value") == ""
    page.click("#prompt")
    page.evaluate("document.getElementById('prompt').select()")
    page.type("a person talking, smiling")
    page.key("Enter")
    page.wait(noted("The new prompt is in use"))
    stop(page)


def test_a_reload_goes_on_with_the_session(page: Page, live: str) -> None:
    start(page, live, face="nia")
    kept = page.evaluate("sessionStorage.getItem('session')")
    page.evaluate("window.isOld = true")
    page.command("Page.reload")
    page.wait("!window.isOld")
    page.wait(LIVE, 30)
    assert page.evaluate("sessionStorage.getItem('session')") == kept
    assert page.evaluate("document.querySelector('input[name=face]:checked').value") == "nia"
    stop(page)
    assert page.evaluate("sessionStorage.getItem('session')") is None
