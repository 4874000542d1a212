"""What is heard and seen over a WebSocket when the network pauses: each sound once, its picture with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest

from tests.serving.browser.chromium import Page
from tests.serving.browser.conftest import Puppets

RATE, PERIOD, STORE = 16_000, 0.04, 0.12
STEP = 0.016  # seconds between two looks at the screen: whole quanta of Web Audio
# The player with the browser's own mixer, which renders faster than real time and waits at each step for what
# arrives then. Pictures are not decoded: what counts is when each is drawn.
RENDER = """
(async (pieces, seconds, step) => {
  const context = new OfflineAudioContext(1, 16000 * seconds, 16000);
  const wait = context.suspend.bind(context);
  const goOn = context.resume.bind(context);
  Object.defineProperties(context, {
    state: { value: "running" },
    resume: { value: () => {} },
    onstatechange: { set() {} },
  });
  window.AudioContext = function () { return context; };
  let repaint;
  window.requestAnimationFrame = (call) => (repaint = call);
  window.VideoDecoder = class {
    constructor({ output }) { this.output = output; }
    configure() { this.state = "configured"; }
    decode({ timestamp }) { this.output({ timestamp, close() {} }); }
  };
  const drawn = [];
  const drawImage = ({ timestamp }) => drawn.push([context.currentTime, timestamp / 1e6]);
  const canvas = { getContext: () => ({ drawImage }) };
  const { Player } = await import("/page/player.js");
  const player = new Player({ canvas, video: { codec: "" }, view: { shown() {} } });
  let number = 0;
  const arrive = (time, value) => {
    player.hear(time, new Int16Array(640).fill(value));
    player.see(time, new Uint8Array(1), number++, true);
  };
  for (let at = step; at < seconds - step; at += step)
    wait(at).then(() => {
      while (pieces.length && pieces[0][0] <= at) arrive(...pieces.shift().slice(1));
      repaint();
      goOn();
    });
  const sound = (await OfflineAudioContext.prototype.startRendering.call(context)).getChannelData(0);
  return { sound: [...sound].map((value) => Math.round(32768 * value)), drawn };
})
"""


@dataclasses.dataclass
class Played:
    """`piece` [samples]: the number of the piece that is heard, or -1. `drawn` [n, 2]: when, and its time."""

    piece: np.ndarray
    drawn: np.ndarray

    def delay(self, begin: float, end: float) -> np.ndarray:
        """Seconds from when a moment was sent until it is heard, for each sample between these times."""
        at = np.arange(int(begin * RATE), int(end * RATE))
        found = self.piece[at]
        first = np.flatnonzero(np.diff(found, prepend=-2))
        return (at[first] / RATE - found[first] * PERIOD)[1:]


@pytest.fixture
def play(page: Page, puppets: Callable[..., Puppets]) -> Callable[..., Played]:
    """Plays moments that arrive at these times; those in `silent` are so soft that nobody misses them."""
    page.open(puppets().url)

    def run(arrivals: np.ndarray, silent: range = range(0)) -> Played:
        numbers = range(len(arrivals))
        values = [number + (10 if number in silent else 4000) for number in numbers]
        pieces = [[float(arrivals[n]), n * PERIOD, values[n]] for n in numbers]
        seconds = int(arrivals[-1]) + 2
        told = page.evaluate(f"{RENDER}({json.dumps(pieces)}, {seconds}, {STEP})")
        number_of = {0: -1} | {value: number for number, value in enumerate(values)}
        strange = set(told["sound"]) - set(number_of)
        assert not strange, f"sounds on top of each other: {sorted(strange)[:5]}"
        return Played(np.array([number_of[value] for value in told["sound"]]), np.array(told["drawn"]))

    return run


def paused(moments: int, begin: float, seconds: float) -> np.ndarray:
    """When moments arrive over a network that is quick, but for a pause, after which all come at once."""
    sent = PERIOD * np.arange(moments) + STEP
    return np.where((sent > begin) & (sent < begin + seconds), begin + seconds, sent)


@pytest.mark.parametrize("seconds", [0.3, 0.8, 2.0])
def test_after_a_pause_of_the_network_all_is_heard_once(play: Callable[..., Played], seconds: float) -> None:
    played = play(paused(150, 2.0, seconds))
    heard = played.piece[played.piece >= 0]
    assert (np.diff(heard) >= 0).all()  # none again, none out of turn
    after = heard[heard > 25 * (2.0 + seconds)]
    assert (np.unique(after) == np.arange(after[0], 150)).all()  # and all that came after it
    assert played.delay(2.0 + seconds + 1.0, 5.9).max() < 0.4 + PERIOD


def test_delay_that_is_not_needed_is_given_up_in_a_pause_of_the_speech(play: Callable[..., Played]) -> None:
    silence = range(225, 250)  # 9 to 10 s
    played = play(paused(300, 2.0, 0.24), silence)
    assert played.delay(3.0, 8.9).min() > STORE + 0.2  # speech is left as it is
    assert played.delay(10.5, 11.9).max() < STORE + PERIOD + STEP
    left_out = np.setdiff1d(np.arange(300), played.piece)
    assert len(left_out)
    assert set(left_out) <= set(silence)


def test_delay_is_kept_while_the_network_needs_it(play: Callable[..., Played]) -> None:
    """It pauses every 4 s, and nobody speaks."""
    arrivals = np.maximum(paused(300, 2.0, 0.24), np.maximum(paused(300, 6.0, 0.24), paused(300, 10.0, 0.24)))
    played = play(arrivals, range(300))
    assert (np.unique(played.piece[played.piece >= 0]) == np.arange(300)).all()


def test_pictures_stay_with_their_sound(play: Callable[..., Played]) -> None:
    """Through a pause of the network, catching up, and giving delay up. Silence has nothing to show."""
    silence = range(225, 250)
    played = play(np.maximum(paused(300, 1.0, 0.3), paused(300, 2.0, 0.8)), silence)
    at, times = played.drawn.T
    seen, heard = np.round(times / PERIOD), played.piece[(at * RATE).astype(int)]
    apart = np.abs(heard - seen)[(heard >= 0) & ~np.isin(seen, silence)]
    assert len(apart) > 200
    assert apart.max() <= 1


@pytest.mark.parametrize("seconds", [0.26, 0.34, 0.42, 0.5])
def test_pictures_go_on_after_a_pause_of_the_network(play: Callable[..., Played], seconds: float) -> None:
    """However much delay it has left: decoded pictures wait, and there is room for few."""
    played = play(paused(150, 2.0, seconds))
    at = played.drawn[:, 0]
    assert np.sum((at > 3.0) & (at < 5.0)) >= 49
