"""From frames to latents, a few frames at a time: memory does not grow with the length of a clip."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lavatar_jax.models.vae import CausalVAE

# Latents that pass through the VAE at once: a block, so that a stream of blocks runs the same program.
CHUNK_LATENTS = 3


def chunks(count: int, size: int) -> list[slice]:
    """A clip of `count` (frames to encode, or latents to decode): a first piece, then pieces of `size`.

    What does not fill a piece goes to the first one, which differs anyway: the first frame is a latent by
    itself. So a clip takes two programs, one for how it begins and one for how it goes on.
    """
    first = 1 + (count - 1) % size
    return [slice(0, first), *(slice(begin, begin + size) for begin in range(first, count, size))]


def frame_chunks(vae: CausalVAE, frames: int) -> list[slice]:
    """`chunks` of a clip of `frames` to encode."""
    return chunks(frames, CHUNK_LATENTS * vae.config.temporal_factor)


@functools.partial(jax.jit, static_argnames="first", donate_argnames="cache")
def encode_chunk(vae: CausalVAE, video: Array, cache: Any, *, first: bool) -> tuple[Array, Any]:
    """The next latents of a video, and the caches to go on with; `cache` None where it begins."""
    return vae.stream_encode(video, cache, first=first)


def encode(
    vae: CausalVAE, video_BTHWC: Float[Array | np.ndarray, "B T H W 3"]
) -> Float[Array, "B F H2 W2 C"]:
    """Normalised latents of a clip of 1 + r k frames; equals `vae.encode`, in the memory of a chunk.

    The reference encodes chunks of 1, 4, 4, ... frames, which gives the same numbers up to rounding.
    Raises UserError for other numbers of frames, and for sizes that the VAE does not divide.
    """
    pieces = frame_chunks(vae, video_BTHWC.shape[1])
    if len(pieces) == 1:
        return _encode_alone(vae, video_BTHWC)
    cache, latents = None, []
    for piece in pieces:
        latent, cache = encode_chunk(vae, video_BTHWC[:, piece], cache, first=cache is None)
        latents.append(latent)
    return jnp.concatenate(latents, axis=1)


# Nothing comes after a photo: without caches as results it compiles in two thirds of the time.
_encode_alone = jax.jit(lambda vae, video: vae.encode(video))
