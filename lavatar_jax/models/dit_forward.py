"""Four ways to run the same weights: sink prefill, streaming block, training forward, teacher forward.

Latents are [B, F, H, W, C] with F latent frames; every forward returns the velocity v = eps - x0 in
float32. Times are `embed_time(timestep_sinusoid(t))`, one row per latent frame; `text` is
`text_keys_values(states)`; positions are `Rope` tables from the host (see rope.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lavatar_jax.config import DiTConfig
from lavatar_jax.models import rope as rp
from lavatar_jax.models.attention import (
    KV,
    RingCache,
    RingSlot,
    block_causal_attention,
    dot_product_attention,
    ring_attention,
)
from lavatar_jax.models.audio_encoder import AudioTokens, encode_audio
from lavatar_jax.models.dit import (
    CausalDiT,
    Remat,
    Sequence,
    Times,
    run_layers,
    timestep_sinusoid,
    with_condition_row,
)
from lavatar_jax.models.rope import Rope, apply_rope

DropMotion = Literal["none", "all", "part"]
Attend = Callable[..., Float[Array, "B T N H"]]  # (q, k, v, implementation=...)


def cond_tokens(config: DiTConfig, height: int, width: int, *, motion: bool) -> int:
    """Number of reference and motion tokens at a latent size."""
    grids = rp.sink_grids(height, width, config.patch, motion=motion)
    return sum(int(np.prod(grid.shape)) for grid in grids)


def sink_keys_values(
    model: CausalDiT,
    ref_B1HWC: Float[Array, "B 1 H W C"],
    motion_BFHWC: Float[Array, "B F H W C"] | None,
    text: KV,
    *,
    drop_motion: bool = False,
    half_table: bool = False,
) -> KV:
    """Keys and values [L, B, C, N, H] of the reference (and packed motion) tokens: t = 0, no audio.

    Keys come without rope, since the sink rolls. `drop_motion` blanks the motion tokens and their positions
    in this pass only, as the reference does.
    """
    _, _, height, width, _ = ref_B1HWC.shape
    config = model.config
    grids = rp.sink_grids(height, width, config.patch, motion=motion_BFHWC is not None)
    table = rp.rope(grids, config.head_dim, half_table=half_table)
    x = model.embed_reference(ref_B1HWC)
    if motion_BFHWC is not None:
        n_ref, n_motion = x.shape[1], table.cos.shape[0] - x.shape[1]
        tokens = model.embed_motion(motion_BFHWC, drop=n_motion if drop_motion else 0)
        x = jnp.concatenate([x, tokens], axis=1)
        if drop_motion:
            table = rp.concatenate(
                Rope(table.cos[:n_ref], table.sin[:n_ref]), rp.zero_rope(n_motion, config.head_dim)
            )

    def attend(layer: Any, q: Array, kv: KV, state: None, _: None) -> tuple[Array, None, KV]:
        y = dot_product_attention(
            apply_rope(q, table), apply_rope(kv.k, table), kv.v, implementation=config.attention
        )
        return y, state, kv

    no_frames = model.embed_time(jnp.zeros((x.shape[0], 0, config.freq_dim)))
    e0 = with_condition_row(model, no_frames).e0
    sequence = Sequence(frames=0, tokens_per_frame=0, cond=x.shape[1])
    _, _, sink = run_layers(model, x, e0, text, sequence, attend)
    return sink


def write_sink(cache: RingCache, sink: KV) -> RingCache:
    """Put keys (without rope) and values [L, B, C, N, H] into the cache's sink."""
    if sink.k.shape[2] != cache.sink_tokens:
        raise ValueError(f"the cache holds {cache.sink_tokens} sink tokens, the sink has {sink.k.shape[2]}")
    v = jax.lax.dynamic_update_slice(cache.v, sink.v.astype(cache.v.dtype), (0, 0, 0, 0, 0))
    return dataclasses.replace(cache, v=v, sink_k=sink.k.astype(cache.sink_k.dtype))


def prefill_sink(
    model: CausalDiT,
    cache: RingCache,
    ref_B1HWC: Float[Array, "B 1 H W C"],
    motion_BFHWC: Float[Array, "B F H W C"] | None,
    text: KV,
    *,
    drop_motion: bool = False,
    half_table: bool = False,
) -> RingCache:
    """`sink_keys_values` written into the cache's sink."""
    sink = sink_keys_values(
        model,
        ref_B1HWC,
        motion_BFHWC,
        text,
        drop_motion=drop_motion,
        half_table=half_table,
    )
    return write_sink(cache, sink)


def stream_forward(
    model: CausalDiT,
    cache: RingCache,
    latent_BFHWC: Float[Array, "B F H W C"],
    times: Times,
    text: KV,
    audio: AudioTokens,
    slot: RingSlot,
    rope: Rope,
    sink_rope: Rope,
    *,
    pose_BFHWC: Float[Array, "B F H W C"] | None = None,
    actor_mask_BPFHW: Float[Array, "B P F H W"] | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, "B F H W C"], RingCache]:
    """One denoising step of one block -> (velocity, cache with this block's noisy keys and values).

    The block attends to the sink, the ring and itself, in both directions inside the block. Its keys and
    values replace the oldest block's *before* attention. Donate the cache: it is updated in place.
    """
    frames = latent_BFHWC.shape[1]
    x = model.embed_noisy(latent_BFHWC, pose_BFHWC)

    def attend(layer: Any, q: Array, kv: KV, ring: KV, sink_k: Array) -> tuple[Array, KV, None]:
        kind = model.config.attention
        y, ring = ring_attention(layer, q, kv, ring, sink_k, slot, rope, sink_rope, implementation=kind)
        return y, ring, None

    x, ring, _ = run_layers(
        model,
        x,
        times.e0,
        text,
        Sequence(frames, x.shape[1] // frames),
        attend,
        KV(cache.k, cache.v),
        per_layer=cache.sink_k,
        audio=audio,
        actor_mask_BPFHW=actor_mask_BPFHW,
        unroll=unroll,
    )
    flow = model.head(x, times.e, latent_BFHWC)
    return flow, dataclasses.replace(cache, k=ring.k, v=ring.v)


def block_causal_mask(
    frames: int, tokens_per_frame: int, cond: int, block_frames: int
) -> Bool[np.ndarray, "T T"]:
    """Who may attend to whom (row: query) in the sequence noisy | reference | motion.

    A noisy token sees its own block, earlier blocks and all condition tokens; condition tokens see each
    other only. The last block may be short. For checks: nothing masks where it is fast.
    """
    n = frames * tokens_per_frame
    place = np.arange(n + cond)
    block = place // (block_frames * tokens_per_frame)
    row, column = place[:, None], place[None, :]
    return (column >= n) | ((row < n) & (block[:, None] >= block[None, :]))


def train_rope(
    config: DiTConfig,
    frames: int,
    height: int,
    width: int,
    *,
    frame_start: int = 0,
    ref_frame: int = rp.REFERENCE_FRAME,
    motion: bool = False,
    half_table: bool = False,
) -> Rope:
    """Positions of the sequence noisy | reference | motion, for the one-pass forwards."""
    grids = [
        rp.video_grid(frame_start, frames, height // config.patch, width // config.patch),
        *rp.sink_grids(height, width, config.patch, ref_frame - rp.REFERENCE_FRAME, motion),
    ]
    return rp.rope(grids, config.head_dim, half_table=half_table)


def train_forward(
    model: CausalDiT,
    latent_BFHWC: Float[Array, "B F H W C"],
    t_BF: Float[Any, "B F"],
    *,
    text_BSE: Float[Array, "B S E"],
    audio: AudioTokens | Float[Array, "B P L A T"],
    ref_B1HWC: Float[Array, "B 1 H W C"],
    motion_BFHWC: Float[Array, "B F H W C"] | None = None,
    pose_BFHWC: Float[Array, "B F H W C"] | None = None,
    actor_mask_BPFHW: Float[Array, "B P F H W"] | None = None,
    rope: Rope | None = None,
    drop_motion: DropMotion = "none",
    blockwise_audio: bool = False,
    without: Bool[Array, " 2"] | None = None,
    mask: Bool[Any, "T T"] | None = None,
    remat: Remat = "none",
    unroll: bool = False,
) -> Float[Array, "B F H W C"]:
    """Diffusion forcing: the whole clip in one pass, block-causal, one timestep (0..1000) per frame.

    Reference behaviour 3.9. `audio`: tokens, or features [B, P speakers, L, A, 4 F], which are encoded as
    one stretch, or with `blockwise_audio` block by block, as streaming does. `rope` defaults to a clip
    that starts at frame 0 with the reference at 30 (see `train_rope`; it may also be traced).
    `without`: whether there are no reference and no motion tokens, which may be known only in the program.
    `mask` [T, T]: who attends to whom instead, over noisy | reference | motion tokens; for checks, as all
    products are computed.
    """
    config = model.config
    frames, height, width = latent_BFHWC.shape[1:4]
    if not isinstance(audio, AudioTokens):
        pieces = config.block_frames if blockwise_audio else None
        audio = encode_audio(model.audio_encoder, audio, block_frames=pieces)
    table = (
        train_rope(config, frames, height, width, motion=motion_BFHWC is not None) if rope is None else rope
    )
    x = model.embed_noisy(latent_BFHWC, pose_BFHWC)
    sequence_parts = [x, model.embed_reference(ref_B1HWC)]
    if motion_BFHWC is not None:
        n_motion = table.cos.shape[0] - sum(part.shape[1] for part in sequence_parts)
        dropped = {"none": 0, "all": n_motion, "part": max(0, config.motion_frames[1] - frames)}[drop_motion]
        sequence_parts.append(model.embed_motion(motion_BFHWC, drop=dropped))
        if dropped:
            first = table.cos.shape[0] - n_motion
            kept = np.ones((table.cos.shape[0], 1), np.float32)
            kept[first : first + dropped] = 0
            table = Rope(table.cos * kept, table.sin * kept)
    noisy, reference = (part.shape[1] for part in sequence_parts[:2])
    cond = sum(part.shape[1] for part in sequence_parts[1:])
    there: Array | int = cond
    if without is not None and mask is not None:
        raise ValueError("a mask says itself which conditions are seen: give it or `without`")
    if without is not None:  # those that are there come first
        first = jnp.where(without[0], reference, 0)
        sequence_parts[1:] = [jnp.roll(jnp.concatenate(sequence_parts[1:], axis=1), -first, axis=1)]
        table = jax.tree.map(lambda x: jnp.concatenate([x[:noisy], jnp.roll(x[noisy:], -first, 0)]), table)
        there = jnp.sum(jnp.where(without, 0, jnp.array([reference, cond - reference])))
    x = jnp.concatenate(sequence_parts, axis=1)
    sequence = Sequence(frames, noisy // frames, cond)
    attend: Attend = functools.partial(
        block_causal_attention,
        noisy=noisy,
        block=config.block_frames * sequence.tokens_per_frame,
        there=there,
    )
    if mask is not None:
        attend = functools.partial(dot_product_attention, mask=mask)
    return _one_pass(
        model,
        x,
        sequence,
        t_BF,
        text_BSE,
        audio,
        actor_mask_BPFHW,
        table,
        attend,
        latent_BFHWC,
        remat,
        unroll,
    )


def teacher_forward(
    model: CausalDiT,
    latent_BFHWC: Float[Array, "B F H W C"],
    t_B: Float[Any, " B"],
    *,
    text_BSE: Float[Array, "B S E"],
    audio_BPLAT: Float[Array, "B P L A T"],
    ref_B1HWC: Float[Array, "B 1 H W C"],
    motion_BFHWC: Float[Array, "B F H W C"] | None = None,
    pose_BFHWC: Float[Array, "B F H W C"] | None = None,
    add_last_motion: int = 2,
    remat: Remat = "none",
) -> Float[Array, "B F H W C"]:
    """The bidirectional teacher (Wan2.2-S2V): full attention, one timestep per sample.

    Reference behaviour 12. Motion frames are dropped by leaving them out (None).
    """
    config = model.config
    frames, height, width = latent_BFHWC.shape[1:4]
    audio = encode_audio(model.audio_encoder, audio_BPLAT)
    table = train_rope(config, frames, height, width, motion=motion_BFHWC is not None)
    x = model.embed_noisy(latent_BFHWC, pose_BFHWC)
    noisy = x.shape[1]
    parts = [x, model.embed_reference(ref_B1HWC)]
    if motion_BFHWC is not None:
        parts.append(model.embed_motion(motion_BFHWC, add_last_motion=add_last_motion))
    x = jnp.concatenate(parts, axis=1)
    sequence = Sequence(frames, noisy // frames, x.shape[1] - noisy)
    xp = np if isinstance(t_B, np.ndarray) else jnp
    t_BF = xp.broadcast_to(t_B[:, None], (t_B.shape[0], frames))
    return _one_pass(
        model, x, sequence, t_BF, text_BSE, audio, None, table, dot_product_attention, latent_BFHWC, remat
    )


def _one_pass(
    model: CausalDiT,
    x: Array,
    sequence: Sequence,
    t_BF: Any,
    text_BSE: Array,
    audio: AudioTokens,
    actor_mask_BPFHW: Array | None,
    table: Rope,
    among: Attend,
    latent_BFHWC: Array,
    remat: Remat,
    unroll: bool = False,
) -> Array:
    times = model.embed_time(jnp.asarray(timestep_sinusoid(t_BF, model.config.freq_dim)))

    def attend(layer: Any, q: Array, kv: KV, state: None, _: None) -> tuple[Array, None, None]:
        q, k = apply_rope(q, table), apply_rope(kv.k, table)
        return among(q, k, kv.v, implementation=model.config.attention), state, None

    x, _, _ = run_layers(
        model,
        x,
        with_condition_row(model, times).e0,
        model.text_keys_values(text_BSE),
        sequence,
        attend,
        audio=audio,
        actor_mask_BPFHW=actor_mask_BPFHW,
        remat=remat,
        unroll=unroll,
    )
    return model.head(x[:, : sequence.noisy], times.e, latent_BFHWC)
