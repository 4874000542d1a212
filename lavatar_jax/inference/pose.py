"""A video of poses as latents that follow the blocks of the rollout."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lavatar_jax.inference.conditions import to_signed
from lavatar_jax.inference.encode import encode_chunk
from lavatar_jax.inference.images import resize_and_crop
from lavatar_jax.models.vae import CausalVAE


class PoseEncoder:
    """Pose video -> pose latents, block by block; after its end the last frame is held.

    As in the reference, frames are resized and cropped as the photo is, and every clip is encoded by itself
    behind one copy of its first frame, whose latent is dropped.

    Args:
        clip_blocks: blocks of a clip.
        block_frames: latent frames of a block.
        lead: copies of the first frame in front: as many as the decoder drops, so that poses stay in step
            with the sound, which is led in the same way.
    """

    def __init__(
        self,
        vae: CausalVAE,
        frames: Iterable[UInt8[np.ndarray, "T H W 3"]],
        clip_blocks: int,
        *,
        height: int,
        width: int,
        block_frames: int = 3,
        lead: int = 0,
    ) -> None:
        self.vae, self.clip_blocks, self.height, self.width = vae, clip_blocks, height, width
        self.block_frames = block_frames
        self._frames = _led((frame for piece in frames for frame in piece), lead)

    def __iter__(self) -> Iterator[Float[Array, "1 F H W C"]]:
        block, last = 0, np.zeros((self.height, self.width, 3), np.uint8)
        cache: Any = None
        while True:
            frames = []
            for _ in range(self.block_frames * self.vae.config.temporal_factor):
                frame = next(self._frames, None)
                last = last if frame is None else resize_and_crop(frame, self.height, self.width)
                frames.append(last)
            video = jnp.asarray(to_signed(np.stack(frames)))[None]
            if block % self.clip_blocks == 0:
                _, cache = encode_chunk(self.vae, video[:, :1], None, first=True)
            latent, cache = encode_chunk(self.vae, video, cache, first=False)
            yield latent
            block += 1


def _led(frames: Iterator[np.ndarray], lead: int) -> Iterator[np.ndarray]:
    """`lead` copies of the first frame before it."""
    for first in itertools.islice(frames, 1):
        yield from itertools.repeat(first, lead + 1)
    yield from frames
