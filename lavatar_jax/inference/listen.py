"""Speech as features of video frames, in blocks as the rollout takes them: a recording, or a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
from jaxtyping import Float

from lavatar_jax.config import SamplingConfig
from lavatar_jax.errors import UserError
from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.inference.speech_features import speech_features
from lavatar_jax.inference.speech_stream import Wav2Vec2Stream, Wav2Vec2StreamConfig
from lavatar_jax.models.avatar import Avatar
from lavatar_jax.models.logmel import LogMelStream
from lavatar_jax.models.wav2vec2 import Wav2Vec2

STREAM_FPS = 25  # of `Wav2Vec2Stream` and `LogMelStream`

Samples = Float[np.ndarray, "n"]
Features = Float[np.ndarray, "L A T"]


class FeatureStream(Protocol):
    """Sound in as it arrives, features of video frames out as they are complete; `flush` ends the sound.

    Another stream of the same kind goes on, bit by bit, with what `state` returns.
    """

    def push(self, samples: Samples) -> Features: ...
    def flush(self) -> Features: ...
    def state(self) -> dict[str, np.ndarray]: ...
    def set_state(self, state: Mapping[str, np.ndarray]) -> None: ...


def make_stream(avatar: Avatar) -> FeatureStream:
    """The model's ear, for one recording. Raises UserError for a model of another frame rate than a stream of
    sound is cut into."""
    if avatar.config.fps != STREAM_FPS:
        raise UserError(
            f"the model {avatar.config.name} makes {avatar.config.fps} frames/s, and sound is heard as a "
            f"stream at {STREAM_FPS} only: use generate with a recording of at most two minutes"
        )
    if avatar.speech is not None:
        return Wav2Vec2Stream(avatar.speech, Wav2Vec2StreamConfig(block_frames=frames_per_block(avatar)))
    return LogMelStream(avatar.config.log_mel)


def frames_per_block(avatar: Avatar) -> int:
    """Video frames that one step of the rollout makes: 12."""
    return avatar.config.dit.block_frames * avatar.config.vae.temporal_factor


def listen(
    avatar: Avatar,
    sound: Samples | Iterable[Samples],
    sampling: SamplingConfig,
    *,
    streaming: bool = False,
) -> Iterator[Features]:
    """Mono sound of 16 kHz, whole or in pieces -> features of one block of video frames after the other.

    A whole recording is heard by wav2vec2 as the reference hears it, all at once; `streaming`, or sound in
    pieces, is heard as it arrives. Log-mel features are the same either way. The frames that are dropped at
    the start of a video get features of their own in front of the sound's, so that the first frame shown
    belongs to the first sample (the reference shows the fourth).
    """
    fps, dropped = avatar.config.fps, sampling.drop_first_frames
    block_frames = frames_per_block(avatar)
    if not isinstance(sound, np.ndarray):
        pieces = sound
    elif streaming or avatar.speech is None:
        pieces = np.split(sound, range(SAMPLE_RATE, len(sound), SAMPLE_RATE))
    else:
        return recording_blocks(avatar.speech, sound, sampling, block_frames, fps)
    silence = np.zeros(dropped * SAMPLE_RATE // fps, np.float32)
    pieces = (piece for group in ((silence,), pieces) for piece in group)
    return feature_blocks(make_stream(avatar), pieces, block_frames, fps)


def recording_blocks(
    speech: Wav2Vec2, sound: Samples, sampling: SamplingConfig, block_frames: int, fps: int
) -> Iterator[Features]:
    """The reference's features of a whole recording; zeros complete the last block, or clip if clips are
    decoded whole."""
    clip_frames, dropped = block_frames * sampling.clip_blocks, sampling.drop_first_frames
    features = speech_features(speech, sound, clip_frames, fps=fps)
    features = np.concatenate([features[..., :1].repeat(dropped, axis=-1), features], axis=-1)
    unit = clip_frames if sampling.decode == "clip" else block_frames
    total = -(-(-(-len(sound) * fps // SAMPLE_RATE) + dropped) // unit) * unit
    features = np.pad(features, [(0, 0), (0, 0), (0, max(0, total - features.shape[-1]))])
    for start in range(0, total, block_frames):
        yield features[..., start : start + block_frames]


def feature_blocks(
    stream: FeatureStream, pieces: Iterable[Samples], frames: int, fps: int = 25
) -> Iterator[Features]:
    """Features in blocks of `frames` video frames; silence completes the last one."""
    received, ready = 0, stream.push(np.zeros(0, np.float32))
    for piece in pieces:
        received += len(piece)
        ready = np.concatenate([ready, stream.push(piece)], axis=-1)
        while ready.shape[-1] >= frames:
            yield ready[..., :frames]
            ready = ready[..., frames:]
    missing = -received % (frames * SAMPLE_RATE // fps)
    tail = [ready, stream.push(np.zeros(missing, np.float32)), stream.flush()]
    ready = np.concatenate(tail, axis=-1)
    for start in range(0, ready.shape[-1], frames):
        yield ready[..., start : start + frames]
