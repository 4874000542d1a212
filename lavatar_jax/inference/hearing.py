"""From samples to blocks: the features that a block of video needs, and the sound that belongs to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from lavatar_jax.inference.listen import FeatureStream
from lavatar_jax.inference.sound import SAMPLE_RATE

Samples = Float[np.ndarray, " n"]
FADE = SAMPLE_RATE // 200  # 5 ms: short enough to be at once, long enough not to click


def fade_out(sound: Samples, *, begun: bool) -> None:
    """Silences a sound in place: within 5 ms, or at once where an earlier one has faded (`begun`)."""
    fade = 0 if begun else min(FADE, len(sound))
    sound[:fade] *= np.linspace(1.0, 0.0, fade, dtype=np.float32)
    sound[fade:] = 0.0


@dataclasses.dataclass(frozen=True)
class Ear:
    """What a kind of stream needs and gives: found out once, with silence."""

    delay: int  # samples beyond a block that its features need: the look-ahead
    silence: Float[np.ndarray, "L A T"]  # the features of a silent block


def try_ear(stream: FeatureStream, block_frames: int, fps: int) -> Ear:
    """Lets a stream, which is used up by it, hear silence."""
    frame = SAMPLE_RATE // fps
    features = stream.push(np.zeros(block_frames * frame, np.float32))
    delay = 0
    while features.shape[-1] < block_frames:
        features = np.concatenate([features, stream.push(np.zeros(frame, np.float32))], axis=-1)
        delay += frame
    return Ear(delay, features[..., :block_frames])


class Hearing:
    """One session's ear: feeds a stream and cuts features and sound into blocks that belong together.

    `delay`: what `try_ear` found for such a stream. `listen` takes time, as the stream may be a network: it
    needs no lock, when one thread alone calls it and `take`. All else is about sound, and of a moment.
    """

    def __init__(self, stream: FeatureStream, block_frames: int, fps: int, delay: int) -> None:
        self._stream, self.frames, self.fps = stream, block_frames, fps
        self.block = block_frames * SAMPLE_RATE // fps  # samples of a block
        self._features = stream.push(np.zeros(0, np.float32))
        self._sound = np.zeros(0, np.float32)
        self._unheard: list[Samples] = []  # sound of which there are no features yet
        self.delay = delay
        self.heard = 0  # samples ever
        self.taken = 0  # blocks ever

    def missing(self) -> int:
        """How many more samples the next block needs before `take`."""
        return max(0, self.block + self.delay - len(self._sound))

    def push(self, samples: Samples) -> None:
        """Sound to be heard by `listen`."""
        self._unheard.append(samples)
        self._sound = np.concatenate([self._sound, samples])
        self.heard += len(samples)

    def listen(self) -> None:
        """Finds the features of all that was pushed."""
        while self._unheard:
            features = self._stream.push(self._unheard.pop(0))
            self._features = np.concatenate([self._features, features], axis=-1)

    def take(self) -> tuple[Float[np.ndarray, "L A T"], Samples]:
        """Features and sound of the next block, of which nothing may be missing, nor unheard."""
        features, self._features = np.split(self._features, [self.frames], axis=-1)
        sound, self._sound = np.split(self._sound, [self.block])
        self.taken += 1
        return features, sound.copy()

    def fade_out(self, *, begun: bool) -> None:
        """Silences the sound that is not in a block yet."""
        self._sound = self._sound.copy()
        fade_out(self._sound, begun=begun)

    def state(self) -> dict[str, np.ndarray]:
        """When nothing is unheard."""
        counts = np.array([self.heard, self.taken], np.int64)
        stream = {f"stream.{name}": value for name, value in self._stream.state().items()}
        return {"features": self._features, "sound": self._sound, "counts": counts, **stream}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken."""
        self._features, self._sound = np.array(state["features"]), np.array(state["sound"])
        self.heard, self.taken = (int(count) for count in state["counts"])
        inner = {name.removeprefix("stream."): v for name, v in state.items() if name.startswith("stream.")}
        self._stream.set_state(inner)
