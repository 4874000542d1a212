"""Log-mel audio features with the interface of wav2vec2's hidden states: [layers, dim, video frames].

The small model listens to these instead of a pretrained speech encoder. All constants are fixed, so that
streaming gives exactly the features of the whole recording.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Near the mean (-4.5) and deviation (1.6) of the log10 band powers of an hour of speech with pauses.
BAND_MEAN = -4.0
BAND_STD = 1.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogMelConfig:
    """How audio becomes features of video frames.

    A video frame has `hops_per_frame` mel columns, averaged to `pooled`; its feature vector is those of the
    frames from `past` before to `lookahead` after it, oldest first.
    """

    bands: int = 24
    hop: int = 160  # samples: 10 ms
    window: int = 400  # samples: 25 ms, ending with its hop, so no column looks into the next one
    hops_per_frame: int = 4  # 40 ms: 25 video frames a second
    pooled: int = 2
    past: int = 1  # video frames
    lookahead: int = 2  # video frames
    sample_rate: int = 16_000
    lowest: float = 80.0  # Hz
    highest: float = 7600.0  # Hz
    floor: float = 1e-6  # band power that counts as silence

    @property
    def samples_per_frame(self) -> int:
        return self.hop * self.hops_per_frame

    @property
    def dim(self) -> int:
        return self.bands * self.pooled * (self.past + 1 + self.lookahead)

    def __post_init__(self) -> None:
        if self.hops_per_frame % self.pooled:
            raise ValueError(f"{self.hops_per_frame} hops a frame cannot be averaged to {self.pooled}")


@functools.lru_cache
def mel_filters(config: LogMelConfig) -> Floats:
    """Triangular filters [window // 2 + 1, bands], equally spaced on the mel scale, each summing to 1."""

    def mel(hertz: float) -> float:
        return 2595.0 * np.log10(1.0 + hertz / 700.0)

    edges_mel = np.linspace(mel(config.lowest), mel(config.highest), config.bands + 2)
    edges = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    frequencies = np.fft.rfftfreq(config.window, 1.0 / config.sample_rate)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    filters = np.maximum(np.minimum(rising, falling), 0.0)
    return (filters / np.maximum(filters.sum(axis=0), 1e-9)).astype(np.float32)


def band_powers(frames: Floats, config: LogMelConfig) -> Floats:
    """Mel band powers [T, hops, bands] of complete frames.

    `frames` [window - hop + T * samples_per_frame] begins with the last samples before the first frame. Each
    video frame is computed by itself, in the same shapes, so that results do not depend on how many come at
    once.
    """
    lead, step = config.window - config.hop, config.samples_per_frame
    count = (len(frames) - lead) // step
    windows = np.lib.stride_tricks.sliding_window_view(frames, config.window)[:: config.hop]
    windows = windows[: count * config.hops_per_frame].reshape(count, config.hops_per_frame, config.window)
    taper = np.hanning(config.window + 1)[:-1].astype(np.float32)
    spectrum = np.fft.rfft(windows * taper, axis=-1)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    power = (power / np.square(taper).sum(dtype=np.float64)).astype(np.float32)
    filters = mel_filters(config)
    result = np.empty((count, config.hops_per_frame, config.bands), np.float32)
    for t in range(count):
        result[t] = power[t] @ filters
    return result


def _columns(powers: Floats, config: LogMelConfig) -> Floats:
    """Normalised, pooled mel columns of frames: [T, pooled * bands]."""
    logs = (np.log10(powers + config.floor) - BAND_MEAN) / BAND_STD
    pooled = logs.reshape(len(logs), config.pooled, -1, config.bands).mean(axis=2)
    return pooled.reshape(len(logs), -1).astype(np.float32)


class LogMelStream:
    """Features of a recording that arrives in pieces; their concatenation equals `log_mel` bit by bit."""

    def __init__(self, config: LogMelConfig | None = None) -> None:
        self.config = config = config or LogMelConfig()
        silence = np.zeros((1, config.hops_per_frame, config.bands), np.float32)
        self._silent_column = _columns(silence, config)
        self._samples = np.zeros(config.window - config.hop, np.float32)  # what the next windows need
        self._columns = np.repeat(self._silent_column, config.past, axis=0)  # what the next frames need
        self._received = 0
        self._emitted = 0

    def push(self, samples: Floats) -> Floats:
        """Takes mono samples [n] at 16 kHz; returns the features [1, dim, frames] of the frames now complete.

        Frame j is complete when the samples of frame j + lookahead have arrived. NaN and infinite samples
        count as silence.
        """
        config = self.config
        samples = np.nan_to_num(np.asarray(samples, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        self._received += len(samples)
        self._samples = np.concatenate([self._samples, samples])
        lead, step = config.window - config.hop, config.samples_per_frame
        count = (len(self._samples) - lead) // step
        if count > 0:
            powers = band_powers(self._samples[: lead + count * step], config)
            self._samples = self._samples[count * step :]
            self._columns = np.concatenate([self._columns, _columns(powers, config)])
        return self._emit(len(self._columns) - config.past - config.lookahead)

    def flush(self) -> Floats:
        """Ends the recording (silence follows): the features [1, dim, frames] of all frames that are left.

        Altogether a recording has ceil(samples / samples_per_frame) frames.
        """
        config = self.config
        left = -(-self._received // config.samples_per_frame) - self._emitted
        missing = -self._received % config.samples_per_frame + config.lookahead * config.samples_per_frame
        received = self._received
        first = self.push(np.zeros(missing, np.float32))
        self._received = received
        assert first.shape[-1] == left
        return first

    def _emit(self, count: int) -> Floats:
        config = self.config
        span = config.past + 1 + config.lookahead
        if count <= 0:
            return np.zeros((1, config.dim, 0), np.float32)
        stacked = np.stack([self._columns[t : t + span].reshape(-1) for t in range(count)], axis=-1)
        self._columns = self._columns[count:]
        self._emitted += count
        return stacked[None]

    def state(self) -> dict[str, NDArray]:
        """Everything the next features depend on, for `set_state` of another stream of this configuration."""
        counts = np.array([self._received, self._emitted], np.int64)
        return {"samples": self._samples.copy(), "columns": self._columns.copy(), "counts": counts}

    def set_state(self, state: Mapping[str, NDArray]) -> None:
        """Go on, bit by bit, where `state` was taken."""
        self._samples = np.array(state["samples"], np.float32)
        self._columns = np.array(state["columns"], np.float32)
        self._received, self._emitted = (int(count) for count in state["counts"])


def log_mel(samples: Floats, config: LogMelConfig | None = None) -> Floats:
    """Features [1, dim, ceil(samples / samples_per_frame)] of mono samples [n] at 16 kHz."""
    stream = LogMelStream(config)
    first = stream.push(samples)
    return np.concatenate([first, stream.flush()], axis=-1)
