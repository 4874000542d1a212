"""Types that pass between the parts, and the legend of axis letters.

B batch, P speakers (actors), T tokens or video frames, S cached tokens, F latent frames, H height,
W width, C channels, D model width, L layers, N attention heads, A audio features, E text features.
Pixels are [B, T, H, W, 3] in [-1, 1]; latents [B, F, H, W, C]; both channels last.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditions:
    """What stays the same through a video: who speaks, and what the prompt asks for.

    text: prompt states, zero-padded. reference: latent of the photo (the sink). motion: latents of the
    frames before the video (None: the model has no frame packer). still: latents that fill the streaming
    decoder before the first block. actor_mask: where each speaker's audio applies, on the token grid.
    history: the frames that `motion` encodes, needed only where clips are decoded one by one.
    """

    text: Float[Array, "B S E"]
    reference: Float[Array, "B 1 H W C"]
    motion: Float[Array, "B F H W C"] | None
    still: Float[Array, "B F H W C"]
    actor_mask: Float[Array, "B P F H W"] | None = None
    history: Float[Array, "B T H W 3"] | None = None


class BlockInput(NamedTuple):
    """What arrives with each block of 12 video frames: speech features, and a pose where used."""

    audio: Float[Array, "B P L A T"]
    pose: Float[Array, "B F H W C"] | None = None
