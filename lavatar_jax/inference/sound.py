"""Reading a recording: any common format, rate and number of channels, in constant memory.

The same decoder serves two listeners: the audio encoder wants 16 kHz mono, all of it; the video file
wants the recording as it sounded, piece by piece while frames are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import soxr

from lavatar_jax.errors import UserError
from lavatar_jax.inference.inputs import open_media

SAMPLE_RATE = 16_000  # Hz, what the audio encoders were trained on
TRACK_RATE = 48_000  # Hz, what every player and AAC encoder takes
LOUDEST = 1000.0  # float samples lie in [-1, 1]; beyond this they are damage (or not a number)
FORMATS = "WAV, MP3, FLAC, OGG or M4A"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sound:
    """A checked recording: every sample was decoded once and is a finite number."""

    path: Path
    samples: np.ndarray  # float32 [T] mono at SAMPLE_RATE
    channels: int  # of the track: 1 or 2

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    def track(self) -> Iterator[np.ndarray]:
        """The recording for the video file: float32 [channels, n] pieces at TRACK_RATE, decoded anew."""
        return read_sound(self.path, rate=TRACK_RATE, channels=self.channels)


def load_sound(path: str | Path) -> Sound:
    """Decodes and checks a whole recording.

    An hour takes 230 MB, whatever its original rate. Silence is fine.
    Raises UserError if the file is missing, empty, a folder, no sound, damaged, of length zero, or has
    samples that are not numbers.
    """
    path = Path(path)
    buffer = bytearray()  # grows in place: a list of pieces would have to be held twice to be joined
    for piece in read_sound(path, rate=SAMPLE_RATE, channels=1):
        buffer += piece.tobytes()
    samples = np.frombuffer(buffer, np.float32)
    if not len(samples):
        raise UserError(f"{path} has no sound in it: its length is zero")
    return Sound(path=path, samples=samples, channels=min(2, _count_channels(path)))


def read_sound(path: Path, *, rate: int, channels: int) -> Iterator[np.ndarray]:
    """Decodes a recording piece by piece: float32 [channels, n] at `rate`, ceil(seconds * rate) in all.

    `channels` is 1 (the mean of all, as the reference loads speech) or the file's own number.
    Raises UserError where the file cannot be decoded or its samples are not numbers.
    """
    resampler, received, sent = None, 0, 0
    for source_rate, piece in _decode(path):
        if not np.all(np.abs(piece) < LOUDEST):  # false for NaN and infinity too
            raise UserError(f"{path} has samples that are not numbers in [-1, 1]; export the recording again")
        if channels != len(piece):
            piece = piece.mean(axis=0, keepdims=True).repeat(channels, axis=0)
        if resampler is None:
            resampler = soxr.ResampleStream(source_rate, rate, channels, dtype="float32")
        resampled = resampler.resample_chunk(np.ascontiguousarray(piece.T)).reshape(-1, channels).T
        received, sent = received + piece.shape[1], sent + resampled.shape[1]
        yield resampled
    if resampler is not None:
        # The filter held a few milliseconds back; its rounding must not change the length.
        nothing = np.zeros((0, channels), np.float32)
        rest = resampler.resample_chunk(nothing, last=True).reshape(-1, channels).T
        missing = max(0, -(-received * rate // source_rate) - sent)
        yield np.pad(rest, [(0, 0), (0, max(0, missing - rest.shape[1]))])[:, :missing]


def _audio_stream(container: av.container.InputContainer, path: Path) -> av.AudioStream:
    if not container.streams.audio:
        raise UserError(f"{path} has no audio track; give a {FORMATS} file")
    return container.streams.audio[0]


def _count_channels(path: Path) -> int:
    with open_media(path, "audio", FORMATS) as container:
        return _audio_stream(container, path).channels


def _decode(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (rate, float32 [channels, n]) as the file has them."""
    with open_media(path, "audio", FORMATS) as container:
        stream = _audio_stream(container, path)
        to_float = av.AudioResampler(format="fltp")
        try:
            for frame in container.decode(stream):
                for planar in to_float.resample(frame):
                    yield planar.sample_rate, planar.to_ndarray()
        except (av.FFmpegError, ValueError):
            raise UserError(f"{path} is damaged or cut off; give a complete {FORMATS} file") from None
