"""How the student streams while it trains: as in inference, but differentiable and with traced positions.

`stream_forward` of `models/dit_forward.py` writes into a donated cache that is carried through the layers.
Under differentiation such a carry would be kept once a layer, so here the layers only read the ring, and the
block's keys and values are written behind them. The numbers are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lavatar_jax.config import DiTConfig, SamplingConfig
from lavatar_jax.errors import UserError
from lavatar_jax.inference.denoise import plan_block, ring_count, uses_motion
from lavatar_jax.models.attention import KV, RingCache, dot_product_attention
from lavatar_jax.models.audio_encoder import AudioTokens, encode_audio
from lavatar_jax.models.dit import CausalDiT, Remat, Sequence, Times, run_layers, timestep_sinusoid
from lavatar_jax.models.dit_forward import cond_tokens, sink_keys_values
from lavatar_jax.models.rope import Rope, apply_rope
from lavatar_jax.training.self_forcing import Level


class BlockInputs(NamedTuple):
    """What one block of a rollout gets, stacked over the K blocks of a clip."""

    audio: Float[Array, "K B P L A T"]
    pose: Float[Array, "K B F H W C"] | None
    offset: Int[Array, " K"]  # ring slot that the block writes
    end: Int[Array, " K"]  # ring tokens that are valid then
    rope: Rope  # [K, T, half]
    sink_rope: Rope  # [K, C, half]


class StudentCache(NamedTuple):
    """Rings of all steps and the prompt's keys.

    `rings.k`, `rings.v` have a leading axis R * L: the layers of R rings one after the other (R = 1 where all
    steps share a ring). `rings.sink_k` [L, ...] is the same for all.
    """

    rings: RingCache
    text: Float[Array, "B S E"]


def blocks_of(x: Float[Array, "B F H W C"], frames: int) -> Float[Array, "K B F H W C"]:
    """A clip cut into its blocks."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, frames, *x.shape[2:]), 1, 0)


def clip_of(x: Float[Array, "K B F H W C"]) -> Float[Array, "B F H W C"]:
    """The inverse of `blocks_of`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def block_inputs(
    config: DiTConfig,
    sampling: SamplingConfig,
    audio: Float[Array, "B P L A T"],
    size: tuple[int, int],
    key: Array,
    pose: Float[Array, "B F H W C"] | None = None,
) -> BlockInputs:
    """Positions, slots and conditions of all blocks of clips with latents of `size` rows and columns.

    Positions are those of the sampler from its first block on. Where the sink keeps a random distance, one is
    drawn by `key` for each block.
    """
    span = 4 * config.block_frames  # video frames
    blocks = audio.shape[-1] // span
    low, high = (
        (sampling.sink_distance,) * 2 if isinstance(sampling.sink_distance, int) else sampling.sink_distance
    )
    distances = list(range(low, high + 1))
    plans = [plan_block(config, sampling, block, *size, distances) for block in range(blocks)]
    choice = jax.random.randint(key, (blocks,), 0, len(distances))
    sinks = [jax.tree.map(lambda *parts: np.stack(parts), *plan.sink_ropes) for plan in plans]
    stacked = jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *sinks)  # [K, distances, C, half]
    return BlockInputs(
        audio=jnp.moveaxis(audio.reshape(*audio.shape[:-1], blocks, span), -2, 0),
        pose=None if pose is None else blocks_of(pose, config.block_frames),
        offset=jnp.array([plan.slot.offset for plan in plans]),
        end=jnp.array([plan.slot.end for plan in plans]),
        rope=jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *(plan.rope for plan in plans)),
        sink_rope=jax.tree.map(lambda table: table[jnp.arange(blocks), choice], stacked),
    )


def begin_cache(
    dit: CausalDiT,
    sampling: SamplingConfig,
    reference: Float[Array, "B 1 H W C"],
    text: Float[Array, "B S E"],
    *,
    rings: int | None = None,
) -> StudentCache:
    """Empty rings behind the reference's keys and values. No gradient passes through them.

    `rings`: None, as many as the sampler has; 1 is enough to replay blocks that all exit at the same step.

    Raises UserError for a sampler with motion frames.
    """
    config = dit.config
    batch, _, height, width, _ = reference.shape
    if uses_motion(config, sampling):
        raise UserError("the student streams without motion frames: --sampling.no-motion")
    sink = cond_tokens(config, height, width, motion=False) if sampling.sink else 0
    block = config.block_frames * (height // config.patch) * (width // config.patch)
    rings = rings or ring_count(sampling)
    shape = (rings * config.layers, batch, sink + sampling.ring_blocks * block, config.heads, config.head_dim)
    k = v = jnp.zeros(shape, dit.dtype)
    sink_k = jnp.zeros((config.layers, batch, sink, config.heads, config.head_dim), dit.dtype)
    if sampling.sink:
        kv = sink_keys_values(
            dit, reference, None, dit.text_keys_values(text), half_table=sampling.half_rope_table
        )
        sink_k = kv.k.astype(dit.dtype)
        v = v.at[:, :, :sink].set(jnp.tile(kv.v, (rings, 1, 1, 1, 1)).astype(dit.dtype))
    return jax.lax.stop_gradient(StudentCache(RingCache(k, v, sink_k), text))


def first_layer(rings: RingCache, step: Array | int, layers: int) -> Array | int:
    """Where the ring of one step begins (of all steps, where they share one)."""
    return step * layers if rings.k.shape[0] > layers else 0


def write_rings(rings: RingCache, step: Array | int, entry: KV, offset: Array, layers: int) -> RingCache:
    """Put a block's keys and values [L, B, T, N, H] into the ring of one step."""
    where = (first_layer(rings, step, layers), 0, rings.sink_tokens + offset, 0, 0)
    k, v = (
        jax.lax.dynamic_update_slice(x, new.astype(x.dtype), where)
        for x, new in zip((rings.k, rings.v), entry, strict=True)
    )
    return dataclasses.replace(rings, k=k, v=v)


def block_forward(
    dit: CausalDiT,
    rings: RingCache,
    first: Array | int,
    latent: Float[Array, "B F H W C"],
    times: Times,
    text: KV,
    audio: AudioTokens,
    inputs: BlockInputs,
    *,
    remat: Remat = "none",
) -> tuple[Float[Array, "B F H W C"], KV]:
    """`dit_forward.stream_forward`, differentiable -> (velocity, roped keys and values of the block).

    `first`: of the layers in `rings` that are read. Each layer takes its own when it is computed: a slice of
    a whole ring would be a copy of it, 12 GB at full size. Gradients reach the block's own keys and values,
    not those in the ring.
    """
    x = dit.embed_noisy(latent, inputs.pose)
    rings = jax.lax.stop_gradient(rings)
    n_sink = rings.sink_tokens

    def attend(layer: Any, q: Array, kv: KV, state: None, sink_k: Array) -> tuple[Array, None, KV]:
        past_k, past_v = (
            jax.lax.dynamic_index_in_dim(x, first + layer, keepdims=False) for x in (rings.k, rings.v)
        )

        def put(buffer: Array, new: Array, offset: Any) -> Array:
            return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (0, offset, 0, 0))

        own = KV(apply_rope(kv.k, inputs.rope), kv.v)
        k = put(past_k, apply_rope(sink_k, inputs.sink_rope), 0)
        k, v = (put(old, new, n_sink + inputs.offset) for old, new in ((k, own.k), (past_v, own.v)))
        y = dot_product_attention(
            apply_rope(q, inputs.rope),
            k,
            v,
            length=n_sink + inputs.end,
            implementation=dit.config.attention,
        )
        return y, state, own

    x, _, entry = run_layers(
        dit,
        x,
        times.e0,
        text,
        Sequence(latent.shape[1], x.shape[1] // latent.shape[1]),
        attend,
        per_layer=rings.sink_k,
        audio=audio,
        remat=remat,
    )
    return dit.head(x, times.e, latent), jax.lax.stop_gradient(entry)


def make_predict(
    build: Callable[[Any], CausalDiT], *, remat: Remat = "none"
) -> Callable[[Any, Array, Level, BlockInputs, StudentCache], tuple[Array, StudentCache]]:
    """`self_forcing.Predict` of the transformer that `build(params)` gives."""

    def predict(
        params: Any, x: Array, level: Level, inputs: BlockInputs, cache: StudentCache
    ) -> tuple[Array, StudentCache]:
        dit = build(params)
        layers = dit.config.layers
        times = dit.embed_time(timestep_sinusoid(jnp.full(x.shape[:2], level.t), dit.config.freq_dim))
        text = dit.text_keys_values(cache.text)
        audio = encode_audio(dit.audio_encoder, inputs.audio)
        first = first_layer(cache.rings, level.step, layers)
        flow, entry = block_forward(dit, cache.rings, first, x, times, text, audio, inputs, remat=remat)
        rings = write_rings(cache.rings, level.step, entry, inputs.offset, layers)
        x0 = (x - level.sigma.astype(flow.dtype) * flow).astype(x.dtype)
        return x0, StudentCache(rings, cache.text)

    return predict
