"""Speech features of a whole recording, exactly as the reference computes them.

Normalise the utterance, run wav2vec2 once, interpolate 50 -> 30 features a second, pick 25 (or another rate).
The network sees all of the recording at once and the interpolation depends on its length, so none of this can
be done while sound arrives: that is `speech_stream`.
"""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Float, Int

from lavatar_jax.models.wav2vec2 import Wav2Vec2

Samples = Float[np.ndarray, " n"]
States = Float[np.ndarray, "L T D"]

WAV2VEC2_RATE = 50  # frames a second that the network gives, nominally: one less than a second's samples hold
VIDEO_RATE = 30  # frames a second that the reference resamples to first, whatever the video has


def normalise(samples: Samples) -> Samples:
    """Mean 0 and variance 1 over the utterance; silence stays silence."""
    samples = np.asarray(samples, np.float32)
    if not len(samples):
        return samples
    return ((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)).astype(np.float32)


@jax.jit
def _run(model: Wav2Vec2, samples_Bn: jax.Array) -> jax.Array:
    return model(samples_Bn)


def hidden_states(model: Wav2Vec2, samples: Samples) -> States:
    """All hidden states [layers + 1, T50, D] of an utterance; T50 is 0 for less than 25 ms.

    Every length of sound compiles anew.
    """
    config = model.config
    if not config.frames(len(samples)):
        return np.zeros((config.layers + 1, 0, config.width), np.float32)
    return np.asarray(_run(model, normalise(samples)[None])[0], np.float32)


def resample(states: States, source: int = WAV2VEC2_RATE, target: int = VIDEO_RATE) -> States:
    """Linear interpolation [L, T, D] -> [L, int(T / source * target), D] whose ends coincide.

    Positions are single precision, as in the reference.
    """
    count = states.shape[1]
    wanted = int(count / source * target)
    step = np.float32(count - 1) / np.float32(wanted - 1) if wanted > 1 else np.float32(0)
    position = np.arange(wanted, dtype=np.float32) * step
    low = position.astype(np.int64)
    high = np.minimum(low + 1, count - 1)
    weight = (position - low.astype(np.float32))[:, None]
    return states[:, low] * (1 - weight) + states[:, high] * weight


def pick(states: States, indices: Int[np.ndarray, " N"], *, around: int = 0, stride: int = 1) -> States:
    """[L, T, D] -> [L, N, (2 around + 1) D]: at each index, its neighbours at `stride` too, oldest first.

    Indices beyond the end give zeros; neighbours beyond an end give the frame there.
    """
    layers, count, width = states.shape
    picked = np.zeros((layers, len(indices), (2 * around + 1) * width), np.float32)
    inside = indices < count
    neighbours = indices[inside, None] + stride * np.arange(-around, around + 1)
    chosen = states[:, np.clip(neighbours, 0, max(count - 1, 0))]
    picked[:, inside] = chosen.reshape(layers, len(neighbours), picked.shape[-1])
    return picked


def video_indices(count: int, clip_frames: int, fps: int = 25) -> Int[np.ndarray, " N"]:
    """Which of `count` features of 30 a second each video frame takes, for a whole number of clips.

    The reference always adds a clip, so the last one is partly or wholly beyond the end.
    """
    clips = int(count / (clip_frames * (VIDEO_RATE / fps))) + 1
    return np.round(np.arange(clips * clip_frames) / fps * VIDEO_RATE).astype(np.int64)


def speech_features(
    model: Wav2Vec2, samples: Samples, clip_frames: int, *, fps: int = 25
) -> Float[np.ndarray, "L D N"]:
    """Mono samples [n] of 16 kHz -> features [layers + 1, D, N] of N video frames, whole clips.

    Reference behaviour: zeros after the end of the recording, up to one clip more than it needs. Memory grows
    with the recording's length (about 5 MB a second with the published model).
    """
    states = resample(hidden_states(model, samples))
    features = pick(states, video_indices(states.shape[1], clip_frames, fps))
    return np.ascontiguousarray(features.transpose(0, 2, 1))
