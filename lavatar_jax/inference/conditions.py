"""A photo, a prompt and the masks of actors become `Conditions`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lavatar_jax.config import DiTConfig, SamplingConfig
from lavatar_jax.inference.denoise import uses_motion
from lavatar_jax.inference.encode import encode
from lavatar_jax.models.vae import CausalVAE
from lavatar_jax.types import Conditions


def to_signed(pixels: UInt8[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """uint8 0..255 -> float32 -1..1."""
    return pixels.astype(np.float32) * (2 / 255) - 1


@jax.jit
def to_uint8(video: Float[Array, "*any"]) -> UInt8[Array, "*any"]:
    """Frames in -1..1 -> uint8 0..255, on their device."""
    return jnp.round((video + 1) * 127.5).astype(jnp.uint8)


def image_conditions(
    dit: DiTConfig,
    vae: CausalVAE,
    sampling: SamplingConfig,
    image_HWC: UInt8[np.ndarray, "H W 3"],
    text_1SE: Float[Array, "1 S E"],
    actor_mask_1PFHW: Float[Array, "1 P F H W"] | None = None,
) -> Conditions:
    """Encode the photo, already of the video's size, as reference, as motion frames and as the video's past.

    Reference behaviour 4.2 and 5: the single-GPU release encodes five copies and keeps the second latent,
    the pipeline encodes one; motion frames are copies of the photo too.
    """
    photo = to_signed(image_HWC)

    def still(copies: int) -> np.ndarray:  # without copying: hundreds of frames take a gigabyte
        return np.broadcast_to(photo, (1, copies, *photo.shape))

    reference = encode(vae, still(sampling.reference_copies))[:, -1:]
    motion, history = None, None
    # The decoder starts on latents of the still photo: one frame, then four for each further latent.
    frames = 1 + vae.config.temporal_factor * (sampling.prime_latents - 1)
    if uses_motion(dit, sampling) or sampling.decode == "clip":
        pixels = still(max(frames, sampling.motion_copies))
        motion = encode(vae, pixels)
        start = motion[:, : sampling.prime_latents]
        history = jnp.asarray(pixels) if sampling.decode == "clip" else None
    else:
        start = encode(vae, still(frames))
    return Conditions(
        text=text_1SE,
        reference=reference,
        motion=motion,
        still=start,
        actor_mask=actor_mask_1PFHW,
        history=history,
    )
