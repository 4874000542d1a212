"""Endless clips of people who talk, with everything that was true about them: what the DiT trains and is
measured on.

The clip's first video frame is context only: a causal VAE makes 1 + 4k video frames into 1 + k latent frames,
and the DiT generates latents 1 .. k. Audio frame j drives video frame j + 1, so the 4k audio frames belong to
latents 1 .. k.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from numpy.typing import NDArray

from lavatar_jax.data.faces import Identity, Motion, draw_identity, render
from lavatar_jax.data.motion import MANNERS, Manner, mouth_from_speech, talking_motion
from lavatar_jax.data.references import portrait_pose
from lavatar_jax.data.speech import read_wav
from lavatar_jax.errors import UserError
from lavatar_jax.models.logmel import LogMelConfig, log_mel

Floats = NDArray[np.float32]

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """A talking clip. T = 1 + 4k video frames at 25 per second."""

    video: Floats  # [T, size, size, 3] in [-1, 1]
    reference: Floats  # [size, size, 3]: a neutral photo of the same person
    audio: Floats  # [1, A, T - 1]: features; frame j drives video frame j + 1
    samples: Floats  # [(T - 1) * 640] at 16 kHz, in step with `audio`
    motion: Motion  # fields [T]: the truth; `motion.mouth_open` is the openness
    identity: Identity
    manner: Manner
    split: str
    index: int

    @property
    def caption(self) -> str:
        return self.manner.caption


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recording:
    samples: Floats
    audio: Floats  # [1, A, frames]
    openness: Floats  # [frames]
    width: Floats


def recording_paths(folder: Path, split: str) -> list[Path]:
    """The recordings `speech.write_corpus` made for a split.

    Raises:
        UserError: if there are none.
    """
    paths = sorted((folder / split).glob("*.wav"))
    if not paths:
        raise UserError(
            f"no recordings in {folder / split}: python tools/make_speech.py --out {folder} makes them"
        )
    return paths


@functools.lru_cache(maxsize=256)
def _load(path: Path, mel: LogMelConfig) -> _Recording:
    samples = read_wav(path)
    samples = samples[: len(samples) // mel.samples_per_frame * mel.samples_per_frame]
    openness, width = mouth_from_speech(samples)
    return _Recording(samples=samples, audio=log_mel(samples, mel), openness=openness, width=width)


@functools.partial(jax.jit, static_argnames="size")
def _render(identity: Identity, motion: Motion, size: int) -> jax.Array:
    return render(identity, motion, size)


@functools.partial(jax.jit, static_argnames="split")
def _draw(index: int, split: str) -> Identity:
    return draw_identity(index, split)


def sample_clip(
    index: int,
    frames: int,
    size: int,
    split: str,
    *,
    speech: Path,
    mel: LogMelConfig | None = None,
    manner: Manner | None = None,
) -> Clip:
    """Clip number `index` of a split: identity number `index` speaks a random passage.

    Args:
        frames: video frames, 1 + 4k.
        size: height and width in pixels.
        speech: the folder given to `speech.write_corpus`.
        manner: how the person talks; random if not given.

    Raises:
        UserError: if there are no recordings, or none is long enough.
    """
    if frames % 4 != 1:
        raise ValueError(f"{frames} frames cannot be encoded: the causal VAE takes 1 + 4k")
    mel = mel or LogMelConfig()
    random = np.random.default_rng([index, SPLITS.index(split), 31])
    paths = recording_paths(Path(speech), split)
    recording = _load(paths[random.integers(len(paths))], mel)
    if len(recording.openness) < frames:
        raise UserError(f"the recordings in {speech} are shorter than {frames} video frames")
    start = int(random.integers(len(recording.openness) - frames + 1))  # audio frame of the first video frame
    stop = start + frames
    random_manner = MANNERS[random.integers(len(MANNERS))]
    manner = manner or random_manner
    motion = talking_motion(
        recording.openness[start:stop], recording.width[start:stop], manner, int(random.integers(1 << 30))
    )
    identity = _draw(index, split)
    step = mel.samples_per_frame
    return Clip(
        video=np.asarray(_render(identity, motion, size)),
        reference=np.asarray(_render(identity, portrait_pose(random), size))[0],
        audio=recording.audio[:, :, start + 1 : stop],
        samples=recording.samples[(start + 1) * step : stop * step],
        motion=motion,
        identity=identity,
        manner=manner,
        split=split,
        index=index,
    )
