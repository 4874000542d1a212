"""The sequential rollout: block after block on one device, for as long as audio comes.

This is the oracle that every faster path must equal. Its memory is constant and no index grows: the block
number is a Python int, from which the host computes slot and positions of each block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lavatar_jax.config import SamplingConfig
from lavatar_jax.inference.decode import ClipDecoder, StreamDecoder
from lavatar_jax.inference.denoise import (
    Rings,
    denoise_block,
    fill_sink,
    forwards_per_block,
    init_rings,
    plan_block,
    start_session,
    uses_motion,
)
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.vae import CausalVAE
from lavatar_jax.types import BlockInput, Conditions


@dataclasses.dataclass(frozen=True)
class Block:
    """What one step of the rollout yields.

    `frames` is None until the clip is full (decode="clip") and without a VAE; `rings` live until the next
    block is asked for.
    """

    index: int
    latent: Float[Array, "B F H W C"]
    velocities: tuple[Float[Array, "B F H W C"], ...]
    frames: Float[Array, "B T H W 3"] | None
    rings: Rings


_normal = jax.jit(jax.random.normal, static_argnums=1)  # (key, shape)


class Draws:
    """The random numbers of a rollout, by absolute block index: the same seed gives the same video."""

    def __init__(self, sampling: SamplingConfig, shape: tuple[int, ...], seed: int) -> None:
        self.sampling, self.shape = sampling, shape
        self._key = jax.random.key(seed)
        self._seed = seed

    def _block_key(self, block: int, purpose: int) -> Array:
        high, low = divmod(block, 2**32)
        key = jax.random.fold_in(jax.random.fold_in(self._key, purpose), high)
        return jax.random.fold_in(key, low)

    def noise(self, block: int) -> Array:
        """Start noise of a block, [B, F, H, W, C]."""
        return _normal(self._block_key(block, 0), self.shape)

    def history_noise(self, block: int) -> Array | None:
        """Noise of the extra pass, for fixed-noise history."""
        if self.sampling.history != "fixed_noise":
            return None
        return _normal(self._block_key(block, 1), self.shape)

    def distances(self, block: int) -> list[int]:
        """How far the sink keeps ahead, for each forward of the block."""
        count, distance = forwards_per_block(self.sampling), self.sampling.sink_distance
        if isinstance(distance, int):
            return [distance] * count
        low, high = distance
        generator = np.random.default_rng([abs(self._seed), block])
        return generator.integers(low, high, size=count, endpoint=True).tolist()


def rollout(
    dit: CausalDiT,
    vae: CausalVAE | None,
    conditions: Conditions,
    blocks: Iterable[BlockInput],
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    draws: Draws | None = None,
    on_sink: Callable[[Array, Array | None], None] | None = None,
) -> Iterator[Block]:
    """Denoise and decode block after block (12 frames each) until `blocks` ends.

    Without a VAE nothing is decoded: latents only. `draws` replaces the random numbers, for comparisons.
    `on_sink(reference, motion)` is told each sink.
    """
    config = dit.config
    batch, _, height, width, channels = conditions.reference.shape
    draws = draws or Draws(sampling, (batch, config.block_frames, height, width, channels), seed)
    motion = conditions.motion if uses_motion(config, sampling) else None
    session = start_session(dit, conditions.text, conditions.actor_mask, sampling=sampling)
    rings = init_rings(config, sampling, batch, height, width, dit.dtype)
    decoder = None if vae is None else _make_decoder(vae, conditions, sampling, config.motion_frames[0])

    def set_sink(rings: Rings, reference: Array, motion: Array | None) -> Rings:
        if not sampling.sink:
            return rings
        if on_sink is not None:
            on_sink(reference, motion)
        return fill_sink(dit, rings, reference, motion, session.text, half_table=sampling.half_rope_table)

    rings = set_sink(rings, conditions.reference, motion)
    adapted: Array | None = None
    clip: list[Array] = []
    for index, inputs in enumerate(blocks):
        if index == sampling.adapt_sink_after and adapted is not None:
            # Adaptive attention sink: the model's own first latent replaces the photo, once, for good.
            if sampling.adapt_motion and motion is not None and isinstance(decoder, ClipDecoder):
                motion = decoder.motion
            rings = set_sink(rings, adapted, motion)
        plan = plan_block(config, sampling, index, height, width, draws.distances(index))
        latent, velocities, rings = denoise_block(
            dit, rings, draws.noise(index), inputs, plan, session, draws.history_noise(index)
        )
        if index == 0:
            adapted = latent[:, :1]
        frames = None
        if isinstance(decoder, StreamDecoder):
            frames = decoder(latent)
        elif decoder is not None:
            clip.append(latent)
            if len(clip) == sampling.clip_blocks:
                frames = decoder(jnp.concatenate(clip, axis=1))
                clip.clear()
        yield Block(index, latent, velocities, frames, rings)
    if clip and isinstance(decoder, ClipDecoder):  # audio ended inside a clip
        yield Block(index, latent, velocities, decoder(jnp.concatenate(clip, axis=1)), rings)


def _make_decoder(
    vae: CausalVAE, conditions: Conditions, sampling: SamplingConfig, overlap: int
) -> StreamDecoder | ClipDecoder:
    if sampling.decode == "stream":
        return StreamDecoder(vae, conditions.still, sampling.drop_first_frames)
    if conditions.motion is None or conditions.history is None:
        raise ValueError("decode='clip' needs motion latents and the history frames they encode")
    return ClipDecoder(vae, conditions.history, conditions.motion, overlap, sampling.drop_first_frames)
