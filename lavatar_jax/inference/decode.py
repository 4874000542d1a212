"""From latents to frames: as an endless stream, or clip by clip as the single-GPU release does."""

from __future__ import annotations

import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lavatar_jax.inference.encode import CHUNK_LATENTS, chunks, encode
from lavatar_jax.models.vae import CausalVAE, to_pixels


@functools.partial(jax.jit, static_argnames="first", donate_argnames="cache")
def _stream(vae: CausalVAE, latent: Array, cache: Any, *, first: bool) -> tuple[Array, Any]:
    video, cache = vae.stream_decode(latent, cache, first=first)
    return to_pixels(video), cache


def decode(
    vae: CausalVAE, latent_BFHWC: Float[Array | np.ndarray, "B F H W C"]
) -> Float[Array, "B T H2 W2 3"]:
    """All frames of a clip, in [-1, 1]; equals `vae.decode`, in the memory of a chunk."""
    cache, frames = None, []
    for piece in chunks(latent_BFHWC.shape[1], CHUNK_LATENTS):
        video, cache = _stream(vae, latent_BFHWC[:, piece], cache, first=cache is None)
        frames.append(video)
    return jnp.concatenate(frames, axis=1)


class StreamDecoder:
    """Every block becomes 12 frames, with the VAE's causal caches carried on (release TPP, paper)."""

    def __init__(self, vae: CausalVAE, still_BFHWC: Float[Array, "B F H W C"], drop_first: int) -> None:
        self.vae, self._drop = vae, drop_first
        # The still image fills the caches, so that the video does not begin out of nothing.
        self._cache: Any = None
        for piece in chunks(still_BFHWC.shape[1], CHUNK_LATENTS):
            _, self._cache = _stream(vae, still_BFHWC[:, piece], self._cache, first=self._cache is None)

    @classmethod
    def from_state(cls, vae: CausalVAE, cache: Any, drop_first: int) -> Self:
        """Go on where `state` was taken."""
        decoder = cls.__new__(cls)
        decoder.vae, decoder._cache, decoder._drop = vae, cache, drop_first
        return decoder

    def state(self) -> tuple[Any, int]:
        """The caches, and how many frames of the next block are dropped. Donated by the next block: copy."""
        return self._cache, self._drop

    def __call__(self, latent_BFHWC: Float[Array, "B F H W C"]) -> Float[Array, "B T H W 3"]:
        video, self._cache = _stream(self.vae, latent_BFHWC, self._cache, first=False)
        dropped, self._drop = self._drop, 0
        return video[:, dropped:]


class ClipDecoder:
    """Whole clips, each decoded behind the latents of the frames before it (release, single GPU).

    `history` [B, T, H, W, 3]: the pixels before the video (copies of the photo); `motion` their latents.
    The newest `overlap` decoded frames push the oldest of the history out; `motion` follows.
    A clip is a stream that begins with its motion. Reference behaviour 4.8 and 4.9.
    """

    def __init__(self, vae: CausalVAE, history: Array, motion: Array, overlap: int, drop_first: int) -> None:
        self.vae, self.history, self.motion = vae, history, motion
        self._overlap, self._drop = overlap, drop_first

    def __call__(self, clip_BFHWC: Float[Array, "B F H W C"]) -> Float[Array, "B T H W 3"]:
        stream = StreamDecoder(self.vae, self.motion, 0)
        pieces = chunks(clip_BFHWC.shape[1], CHUNK_LATENTS)
        video = jnp.concatenate([stream(clip_BFHWC[:, piece]) for piece in pieces], axis=1)[:, self._drop :]
        self._drop = 0
        overlap = min(self._overlap, video.shape[1])
        history = jnp.concatenate([self.history, video[:, -overlap:]], axis=1)
        self.history = history[:, -self.history.shape[1] :]
        self.motion = encode(self.vae, self.history)
        return video
