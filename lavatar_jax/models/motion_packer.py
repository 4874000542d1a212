"""The motion-frame packer: 19 latent frames of the past as few tokens, coarser the older they are."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lavatar_jax.models.layers import PatchEmbed

_BUCKETS = (1, 2, 16)  # latent frames, newest bucket first
FRAMES = sum(_BUCKETS)


class MotionPacker(nnx.Module):
    """Newest frame in patches of 1xPxP, the two before in 2x2Px2P, the sixteen before those in 4x4Px4P.

    P is `patch`, the transformer's; 2 in all published models.
    """

    def __init__(self, channels: int, width: int, patch: int = 2, *, rngs: nnx.Rngs) -> None:
        self.near = PatchEmbed((1, patch, patch), channels, width, rngs=rngs)
        self.middle = PatchEmbed((2, 2 * patch, 2 * patch), channels, width, rngs=rngs)
        self.far = PatchEmbed((4, 4 * patch, 4 * patch), channels, width, rngs=rngs)

    def __call__(self, motion_BFHWC: Float[Array, "B F H W C"], add_last_motion: int = 2) -> Array:
        """-> tokens [B, T, D], newest first; T as `rope.motion_grids` says. H, W of at least 4 P.

        Fewer than 19 frames are padded with zeros in front, of more the last 19 are used.
        `add_last_motion` 1 (0) blanks the newest 1 (3) frames; their tokens stay.
        """
        least, size = self.far.weight.shape[1], motion_BFHWC.shape[2:4]
        if min(size) < least:
            raise ValueError(f"motion latents must be at least {least}x{least}, got {size}")
        motion = motion_BFHWC[:, -FRAMES:]
        motion = jnp.pad(motion, ((0, 0), (FRAMES - motion.shape[1], 0), (0, 0), (0, 0), (0, 0)))
        blank = {2: 0, 1: 1, 0: 3}[add_last_motion]
        if blank:
            motion = motion.at[:, -blank:].set(0)
        far, middle, near = jnp.split(motion, (_BUCKETS[2], _BUCKETS[2] + _BUCKETS[1]), axis=1)
        return jnp.concatenate([self.near(near), self.middle(middle), self.far(far)], axis=1)
