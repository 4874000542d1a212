"""Sound in, frames out: the streaming loop around the rollout, for one speaker and one device."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lavatar_jax.config import SamplingConfig
from lavatar_jax.inference.conditions import image_conditions, to_signed
from lavatar_jax.inference.images import cover_and_crop
from lavatar_jax.inference.rollout import rollout
from lavatar_jax.models.avatar import Avatar
from lavatar_jax.models.logmel import LogMelConfig, LogMelStream
from lavatar_jax.models.vae import CausalVAE
from lavatar_jax.models.words import encode_words
from lavatar_jax.types import BlockInput, Conditions

Samples = Float[np.ndarray, "n"]


def photo_conditions(
    avatar: Avatar,
    image_HWC: UInt8[np.ndarray, "H W 3"],
    prompt: str = "",
    sampling: SamplingConfig | None = None,
) -> Conditions:
    """A photo of any size (cropped to the model's square) and a prompt -> conditions for `talk`."""
    config = avatar.config
    image = cover_and_crop(image_HWC, config.image_size, config.image_size)
    text = jnp.asarray(encode_words(prompt, config.dit.text_len, config.dit.text_dim))[None]
    return image_conditions(config.dit, avatar.vae, sampling or config.sampling, image, text)


def talk(
    avatar: Avatar,
    conditions: Conditions,
    sound: Samples | Iterable[Samples],
    *,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    pose: Iterable[UInt8[np.ndarray, "T H W 3"]] | None = None,
) -> Iterator[UInt8[np.ndarray, "T H W 3"]]:
    """Mono sound of 16 kHz, whole or in pieces -> frames, block by block (12 frames of 25 a second).

    Frame j shows the sound from j * 40 ms on. The last block is completed with silence, so there can
    be up to 11 frames more than the sound is long. Memory is constant; sound is read as it is needed.
    """
    config, sampling = avatar.config, sampling or avatar.config.sampling
    block_frames = config.dit.block_frames * avatar.vae.config.temporal_factor
    pieces = np.split(sound, range(16_000, len(sound), 16_000)) if isinstance(sound, np.ndarray) else sound
    if sampling.drop_first_frames:
        # The first frames of the video are not shown; silence in front of the sound takes their place.
        silence = np.zeros(sampling.drop_first_frames * config.log_mel.samples_per_frame, np.float32)
        pieces = (piece for group in ((silence,), pieces) for piece in group)
    features = feature_blocks(config.log_mel, pieces, block_frames)
    poses = iter(PoseEncoder(avatar.vae, pose, sampling.clip_blocks, config.image_size)) if pose else None
    inputs = (BlockInput(jnp.asarray(f[None, None]), next(poses) if poses else None) for f in features)
    for block in rollout(avatar.dit, avatar.vae, conditions, inputs, sampling, seed=seed):
        if block.frames is not None:
            yield np.asarray(_to_uint8(block.frames))[0]


@jax.jit
def _to_uint8(video: Array) -> Array:
    return jnp.round((video + 1) * 127.5).astype(jnp.uint8)


def feature_blocks(
    config: LogMelConfig, pieces: Iterable[Samples], frames: int
) -> Iterator[Float[np.ndarray, "L A T"]]:
    """Speech features in blocks of `frames` video frames; silence completes the last one."""
    stream = LogMelStream(config)
    received, ready = 0, np.zeros((1, config.dim, 0), np.float32)
    for piece in pieces:
        received += len(piece)
        ready = np.concatenate([ready, stream.push(piece)], axis=-1)
        while ready.shape[-1] >= frames:
            yield ready[..., :frames]
            ready = ready[..., frames:]
    missing = -received % (frames * config.samples_per_frame)
    tail = [ready, stream.push(np.zeros(missing, np.float32)), stream.flush()]
    ready = np.concatenate(tail, axis=-1)
    for start in range(0, ready.shape[-1], frames):
        yield ready[..., start : start + frames]


class PoseEncoder:
    """Pose video -> pose latents, block by block; after its end the last frame is held.

    As in the reference, every clip is encoded by itself behind one copy of its first frame, whose latent is
    dropped.
    """

    def __init__(
        self, vae: CausalVAE, frames: Iterable[UInt8[np.ndarray, "T H W 3"]], clip_blocks: int, size: int
    ) -> None:
        self.vae, self.clip_blocks, self.size = vae, clip_blocks, size
        self._frames = (frame for piece in frames for frame in piece)

    def __iter__(self) -> Iterator[Float[Array, "1 F H W C"]]:
        block, last = 0, np.zeros((self.size, self.size, 3), np.uint8)
        cache: Any = None
        while True:
            frames = []
            for _ in range(3 * self.vae.config.temporal_factor):
                frame = next(self._frames, None)
                last = last if frame is None else cover_and_crop(frame, self.size, self.size)
                frames.append(last)
            video = jnp.asarray(to_signed(np.stack(frames)))[None]
            if block % self.clip_blocks == 0:
                empty = self.vae.init_encode_cache(1, self.size, self.size)
                _, cache = _encode_stream(self.vae, video[:, :1], empty, first=True)
            latent, cache = _encode_stream(self.vae, video, cache, first=False)
            yield latent
            block += 1


@functools.partial(jax.jit, static_argnames="first")
def _encode_stream(vae: CausalVAE, video: Array, cache: Any, *, first: bool) -> tuple[Array, Any]:
    return vae.stream_encode(video, cache, first=first)
