"""wav2vec2 features of sound that arrives piece by piece, for ever, in constant memory, compiled once.

The network sees all of a recording at once; a stream cannot wait. For each block of video frames it runs on
a window of fixed length: some seconds of the past, the block, and a little look-ahead. Four things differ
from `speech_features`, which is exact:

- frames see the window only. Convolutions are the same, because windows start on the network's own grid of
  20 ms; frames before the first sample are masked, so the beginning has no invented past.
- mean and variance are those heard so far, not those of the whole recording.
- the reference stretches 50 features a second to 30 so that the ends meet, which depends on the length. The
  stream takes the limit for a long recording: video frame k lies at 5/3 round(6 k / 5) of the network's
  frames. k is counted from the first sample, so the reference's cycle of five frames (30 to 25 a second skips
  each sixth) goes on whatever the length of a block.
- after some seconds of silence, features are zeros, as the reference's are behind the end of a recording; the
  network then rests while the video goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lavatar_jax.models.wav2vec2 import Wav2Vec2

Samples = Float[np.ndarray, " n"]
Features = Float[np.ndarray, "L D T"]

SAMPLE_RATE = 16_000
FPS = 25
PIECE = 320  # samples of 20 ms: one frame of the network, half a video frame
FRAME = SAMPLE_RATE // FPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wav2Vec2StreamConfig:
    """How much a block hears, and what counts as silence.

    Features of a block are ready `lookahead_ms` after its last sample. Less look-ahead is less delay and
    features further from those of the whole recording.
    """

    block_frames: int = 12  # video frames computed at a time; the reference's block
    context_frames: int = 125  # video frames of the past: 5 s
    lookahead_ms: int = 80
    floor_db: float = -50.0  # of full scale: softer is silence, and nothing is amplified from below it
    freeze_ms: int = 500  # silence beyond this does not count in mean and variance; pauses between words do
    memory_seconds: float = 60.0  # mean and variance follow a change of microphone in about this time
    rest_seconds: float = 2.0  # zeros after this much silence; infinity: never

    def __post_init__(self) -> None:
        if self.block_frames < 1 or self.context_frames < 2:
            raise ValueError("a stream needs blocks of 1 video frame and a context of 2 at least")
        if self.lookahead_ms < 0 or self.lookahead_ms % 20:
            raise ValueError(f"a look-ahead of {self.lookahead_ms} ms is not a multiple of 20 ms")

    @property
    def lookahead(self) -> int:
        """Samples."""
        return self.lookahead_ms * SAMPLE_RATE // 1000

    @property
    def window(self) -> int:
        """Samples that the network sees at a time."""
        return (self.context_frames + self.block_frames) * FRAME + self.lookahead


class RunningNorm:
    """Mean and variance of the sound so far, without its long silences."""

    def __init__(self, config: Wav2Vec2StreamConfig) -> None:
        self._floor = 10.0 ** (config.floor_db / 20.0)
        self._freeze = config.freeze_ms * SAMPLE_RATE // 1000
        self._memory = config.memory_seconds * SAMPLE_RATE
        self._mean, self._variance, self._weight = 0.0, 0.0, 0.0
        self._quiet = 0  # samples of silence until now

    def hear(self, samples: Samples) -> Int[np.ndarray, " pieces"]:
        """Takes the next samples; returns how many samples of silence there are at the end of each piece."""
        quiet = []
        for start in range(0, len(samples), PIECE):
            piece = samples[start : start + PIECE].astype(np.float64)
            mean, variance = piece.mean(), piece.var()
            self._quiet = self._quiet + len(piece) if variance < self._floor**2 else 0
            quiet.append(self._quiet)
            if self._quiet > self._freeze:
                continue
            share = len(piece) / (self._weight + len(piece))
            step = mean - self._mean
            self._mean += share * step
            self._variance = (1 - share) * self._variance + share * variance + share * (1 - share) * step**2
            self._weight = min(self._weight + len(piece), self._memory)
        return np.array(quiet, np.int64)

    def __call__(self, samples: Samples) -> Samples:
        deviation = np.sqrt(max(self._variance + 1e-7, self._floor**2))
        return ((samples - self._mean) / deviation).astype(np.float32)

    def state(self) -> np.ndarray:
        """For `set_state`: float64 [4]."""
        return np.array([self._mean, self._variance, self._weight, self._quiet], np.float64)

    def set_state(self, state: np.ndarray) -> None:
        self._mean, self._variance, self._weight = (float(value) for value in state[:3])
        self._quiet = int(state[3])


@jax.jit
def _features(
    model: Wav2Vec2,
    samples_n: Float[Array, " n"],
    first: Int[Array, ""],
    end: Int[Array, ""],
    low_T: Int[Array, " T"],
    weight_T: Float[Array, " T"],
) -> Float[Array, "L D T"]:
    """Hidden states between frames `low` and `low + 1` of a window whose frames [first, end) exist."""
    frame = jnp.arange(model.config.frames(len(samples_n)))
    states = model(samples_n[None], (frame >= first) & (frame < end))[0]
    # Without look-ahead, the frame after the last one is not there yet: the last one stands for it.
    low, high = (jnp.clip(index, first, end - 1) for index in (low_T, low_T + 1))
    weight = weight_T[:, None]
    return jnp.moveaxis(states[:, low] * (1 - weight) + states[:, high] * weight, 1, 2)


class Wav2Vec2Stream:
    """Features of one recording that arrives in pieces; how it is cut into pieces changes nothing.

    The interface is that of `LogMelStream`. Raises ValueError for a network that has not 50 frames a second.
    """

    def __init__(self, model: Wav2Vec2, config: Wav2Vec2StreamConfig | None = None) -> None:
        if model.config.stride != PIECE:
            raise ValueError(f"speech features need a network with a frame each {PIECE} samples")
        self.config = config = config or Wav2Vec2StreamConfig()
        self._model = model
        self._norm = RunningNorm(config)
        # The next window and what has arrived after it. It starts `context_frames` before frame `_done`.
        self._samples = np.zeros(config.context_frames * FRAME, np.float32)
        self._unheard = len(self._samples)  # where the samples start that `_norm` does not know yet
        self._quiet = np.zeros(0, np.int64)  # silence at the end of each piece, from frame `_done` on
        self._received = 0
        self._done = 0

    def push(self, samples: Samples) -> Features:
        """Takes mono samples [n] at 16 kHz; returns the features [layers + 1, D, frames] of whole blocks.

        A block is computed when it and its look-ahead have arrived. NaN and infinite samples count as
        silence.
        """
        samples = np.nan_to_num(np.asarray(samples, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        self._received += len(samples)
        self._samples = np.concatenate([self._samples, samples])
        blocks = [self._empty(0)]
        while len(self._samples) >= self.config.window:
            blocks.append(self._next_block())
        return np.concatenate(blocks, axis=-1)

    def flush(self) -> Features:
        """Ends the recording: the features [layers + 1, D, frames] of all frames that are left.

        Altogether a recording has ceil(samples / 640) frames. The last ones know, as offline, that nothing
        follows. The next recording needs a new stream.
        """
        total = -(-self._received // FRAME)
        blocks = [self._empty(0)]
        while self._done < total:
            left = total - self._done
            blocks.append(self._next_block()[..., :left])
        return np.concatenate(blocks, axis=-1)

    def state(self) -> dict[str, np.ndarray]:
        """Everything the next features depend on, for `set_state` of another stream of this model."""
        counts = np.array([self._unheard, self._received, self._done], np.int64)
        return {
            "samples": self._samples.copy(), "quiet": self._quiet.copy(), "counts": counts,
            "norm": self._norm.state(),
        }  # fmt: skip

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on, bit by bit, where `state` was taken."""
        self._samples, self._quiet = np.array(state["samples"]), np.array(state["quiet"])
        self._unheard, self._received, self._done = (int(count) for count in state["counts"])
        self._norm.set_state(state["norm"])

    def _empty(self, frames: int) -> Features:
        config = self._model.config
        return np.zeros((config.layers + 1, config.width, frames), np.float32)

    def _next_block(self) -> Features:
        """Features of the next block, from the window that `_samples` begins with; its end may be missing."""
        config = self.config
        samples = self._samples[: config.window]
        self._quiet = np.append(self._quiet, self._norm.hear(samples[self._unheard :]))
        features = self._empty(config.block_frames)
        awake = ~self._resting()
        start = 2 * (self._done - config.context_frames)  # the network's frame at which the window starts
        first, end = max(0, -start), self._model.config.frames(len(samples))
        if awake.any() and first < end:
            frames = self._done + np.arange(config.block_frames)
            thirds = 5 * ((12 * frames + 5) // 10)  # position in thirds of the network's frames
            low = (thirds // 3 - start).astype(np.int32)
            weight = (thirds % 3 / 3).astype(np.float32)
            window = np.pad(self._norm(samples), (0, config.window - len(samples)))
            computed = _features(self._model, window, np.int32(first), np.int32(end), low, weight)
            features[..., awake] = np.asarray(computed)[..., awake]

        step = config.block_frames * FRAME
        self._samples = self._samples[step:]
        self._unheard = max(0, len(samples) - step)
        self._quiet = self._quiet[2 * config.block_frames :]
        self._done += config.block_frames
        return features

    def _resting(self) -> np.ndarray:
        """Which frames of the block have had silence for so long that their features are zeros: [T]."""
        last = 2 * np.arange(self.config.block_frames) + 1  # a frame's second piece
        quiet = self._quiet[np.minimum(last, len(self._quiet) - 1)]
        return quiet >= self.config.rest_seconds * SAMPLE_RATE
