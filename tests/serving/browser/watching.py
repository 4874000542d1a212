"""What can be seen on the page while the avatar speaks: its mouth, measured where a viewer sees it."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from tests.serving.browser.chromium import Page

# Every 40 ms: the mouth as 16 x 16 greys, and whether there is sound with it: heard in the stream of a video,
# or, where there is a canvas, as the server tells it.
WATCH = """
window.seen = [];
(() => {
  const small = Object.assign(document.createElement("canvas"), { width: 16, height: 16 });
  const brush = small.getContext("2d", { willReadFrequently: true });
  const video = document.getElementById("video");
  let ear = null;
  if (video.srcObject) {
    const context = new AudioContext();
    ear = context.createAnalyser();
    context.createMediaStreamSource(video.srcObject).connect(ear);
  }
  const heard = () => {
    if (!ear) return "speaking" in document.getElementById("screen").dataset ? 1 : 0;
    const samples = new Float32Array(ear.fftSize);
    ear.getFloatTimeDomainData(samples);
    return Math.hypot(...samples) / Math.sqrt(samples.length);
  };
  window.watching = setInterval(() => {
    const shown = video.srcObject ? video : document.getElementById("canvas");
    const side = shown.videoWidth || shown.width;
    brush.drawImage(shown, 0.36 * side, 0.62 * side, 0.28 * side, 0.24 * side, 0, 0, 16, 16);
    const colours = brush.getImageData(0, 0, 16, 16).data;
    const greys = [];
    for (let i = 0; i < colours.length; i += 4)
      greys.push((colours[i] + colours[i + 1] + colours[i + 2]) / 3);
    window.seen.push([performance.now(), heard(), greys]);
  }, 40);
})();
"""


def watch_mouth(page: Page, seconds: float) -> tuple[float, float]:
    """How far the mouth is from its rest, in greys of 255: while there is speech, and in the pauses between.

    What counts is the middle of each: a machine that is late holds the picture, and has no sound for it.
    """
    page.evaluate(WATCH)
    time.sleep(seconds)
    seen: list[Any] = page.evaluate("clearInterval(window.watching), window.seen")
    times = np.array([at for at, _, _ in seen]) / 1e3
    loud = np.array([heard > 0.01 for _, heard, _ in seen])
    mouths = np.array([greys for _, _, greys in seen])
    distance = np.abs(times[:, None] - times)
    spoken = ~np.any((distance < 0.15) & ~loud, axis=1)
    silent = ~np.any((distance < 0.6) & loud, axis=1)
    assert spoken.any(), "no speech"
    assert silent.any(), "no pause"
    opening = np.abs(mouths - np.median(mouths[silent], axis=0)).mean(axis=1)
    return float(np.mean(opening[spoken])), float(np.mean(opening[silent]))


def no_overflow(page: Page) -> bool:
    """Nothing has to be scrolled sideways."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


# Keeps what is said in the status, and that the avatar speaks: either may pass before anybody looks.
NOTE = """
window.noted = [];
for (const element of [document.getElementById("status"), document.getElementById("screen")])
  new MutationObserver(() => {
    window.noted.push(document.getElementById("status").textContent);
    if ("speaking" in document.getElementById("screen").dataset) window.noted.push("(speaks)");
  }).observe(element, { attributes: true, childList: true, characterData: true, subtree: true });
"""


def note(page: Page) -> None:
    """From now on, `noted` finds what passes quickly."""
    page.evaluate(NOTE)


def noted(words: str) -> str:
    """An expression: whether the status said this at any time, or "(speaks)", since `note`."""
    return f"window.noted.includes({json.dumps(words)})"


# At each repaint: how old the stamped frame is that is shown, in milliseconds.
AGES = """
new Promise((resolve) => {
  const brush = Object.assign(document.createElement("canvas"), { width: 128, height: 128 })
    .getContext("2d", { willReadFrequently: true });
  const ages = [];
  const look = () => {
    const video = document.getElementById("video");
    brush.drawImage(video.srcObject ? video : document.getElementById("canvas"), 0, 0, 128, 128);
    const row = (y) => [...brush.getImageData(0, y, 128, 1).data].filter((_, i) => i % 16 === 8);
    const [bits, others] = [row(116), row(124)].map((greys) => greys.map((grey) => (grey > 127 ? 1 : 0)));
    if (bits.every((bit, index) => bit !== others[index])) {
      const due = bits.reduce((value, bit) => value * 2 + bit, 0);
      ages.push(((Date.now() % 2 ** 32) - due + 2 ** 32) % 2 ** 32);
    }
    if (ages.length < 100) requestAnimationFrame(look);
    else resolve(ages);
  };
  look();
})
"""


def frame_ages(page: Page) -> np.ndarray:
    """Milliseconds [100] from when a frame was made to when it is on the screen."""
    return np.array(page.evaluate(AGES))
