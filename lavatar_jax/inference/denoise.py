"""One block through all denoising steps, each with its own ring: the device side of the rollout."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lavatar_jax.config import DiTConfig, SamplingConfig
from lavatar_jax.diffusion import FlowSchedule, add_noise, euler_step
from lavatar_jax.models import rope as rp
from lavatar_jax.models.attention import KV, RingCache, RingSlot, init_cache, ring_slot
from lavatar_jax.models.audio_encoder import encode_audio
from lavatar_jax.models.dit import CausalDiT, Times, timestep_sinusoid
from lavatar_jax.models.dit_forward import cond_tokens, sink_keys_values, stream_forward, write_sink
from lavatar_jax.models.rope import Rope
from lavatar_jax.types import BlockInput

Rings = tuple[RingCache, ...]


class Session(NamedTuple):
    """What does not change from block to block, computed once: text keys, step embeddings, sigmas."""

    text: KV
    times: tuple[Times, ...]  # one per step
    sigmas: Float[Array, " levels"]
    history_times: Times | None  # for the extra pass that writes clean or fixed-noise history
    history_sigma: Float[Array, ""]
    actor_mask: Float[Array, "B P F H W"] | None


class BlockPlan(NamedTuple):
    """Positions of one block, from its absolute index: where it goes in the ring, and its rope."""

    slot: RingSlot
    rope: Rope
    sink_ropes: tuple[Rope, ...]  # one per step: the reference rolls, by default to a random distance


def schedule(sampling: SamplingConfig) -> FlowSchedule:
    return FlowSchedule(steps=sampling.steps, shift=sampling.shift, doubly_shifted=sampling.doubly_shifted)


def uses_motion(config: DiTConfig, sampling: SamplingConfig) -> bool:
    return config.use_motion and sampling.motion


def ring_count(sampling: SamplingConfig) -> int:
    """Noisy history needs a ring per step; clean or fixed-noise history is the same for all steps."""
    return sampling.steps if sampling.history == "noisy" else 1


@functools.partial(jax.jit, static_argnames="sampling")
def start_session(
    dit: CausalDiT, text_BSE: Array, actor_mask_BPFHW: Array | None, *, sampling: SamplingConfig
) -> Session:
    """Precompute what every forward of a session shares."""
    batch, frames, config = text_BSE.shape[0], dit.config.block_frames, dit.config

    def embed(timestep: float) -> Times:
        sinusoid = timestep_sinusoid(np.full((batch, frames), timestep), config.freq_dim)
        return dit.embed_time(jnp.asarray(sinusoid))

    steps = schedule(sampling)
    sigma = {"noisy": None, "clean": 0.0, "fixed_noise": sampling.history_sigma}[sampling.history]
    return Session(
        text=dit.text_keys_values(text_BSE),
        times=tuple(embed(float(t)) for t in steps.timesteps),
        sigmas=jnp.asarray(steps.sigmas, jnp.float32),
        history_times=None if sigma is None else embed(1000.0 * sigma),
        history_sigma=jnp.float32(sigma or 0.0),
        actor_mask=actor_mask_BPFHW,
    )


def init_rings(
    config: DiTConfig, sampling: SamplingConfig, batch: int, height: int, width: int, dtype
) -> Rings:
    """Empty rings for latents of `height` x `width`."""
    tokens = config.block_frames * (height // config.patch) * (width // config.patch)
    sink = cond_tokens(config, height, width, motion=uses_motion(config, sampling)) if sampling.sink else 0
    ring = sampling.ring_blocks * tokens
    return tuple(init_cache(config, batch, sink, ring, dtype) for _ in range(ring_count(sampling)))


@functools.partial(jax.jit, static_argnames="half_table", donate_argnames="rings")
def fill_sink(
    dit: CausalDiT, rings: Rings, reference: Array, motion: Array | None, text: KV, *, half_table: bool
) -> Rings:
    """Put the reference (and motion) frames into the sink of every ring; one prefill serves all."""
    sink = sink_keys_values(dit, reference, motion, text, half_table=half_table)
    return tuple(write_sink(ring, sink) for ring in rings)


def plan_block(
    config: DiTConfig, sampling: SamplingConfig, block: int, height: int, width: int, distances: list[int]
) -> BlockPlan:
    """Positions of block number `block` (0, 1, 2, ... without end); `distances`: the sink's, per forward."""
    rows, columns = height // config.patch, width // config.patch
    frame = block * config.block_frames
    tokens = config.block_frames * rows * columns

    def table(grids: list[rp.Grid]) -> Rope:
        return rp.rope(grids, config.head_dim, half_table=sampling.half_rope_table)

    def sink_table(distance: int) -> Rope:
        if not sampling.sink:
            return rp.zero_rope(0, config.head_dim)
        roll = rp.sink_roll(frame, distance) if sampling.rolling_rope else 0
        return table(rp.sink_grids(height, width, config.patch, roll, uses_motion(config, sampling)))

    return BlockPlan(
        slot=ring_slot(block, tokens, sampling.ring_blocks * tokens),
        rope=table([rp.video_grid(frame, config.block_frames, rows, columns)]),
        sink_ropes=tuple(sink_table(distance) for distance in distances),
    )


def forwards_per_block(sampling: SamplingConfig) -> int:
    """Network evaluations per block (NFE): noisy history costs no extra one."""
    return sampling.steps + (sampling.history != "noisy")


@functools.partial(jax.jit, donate_argnames="rings")
def denoise_block(
    dit: CausalDiT,
    rings: Rings,
    noise_BFHWC: Float[Array, "B F H W C"],
    inputs: BlockInput,
    plan: BlockPlan,
    session: Session,
    history_noise_BFHWC: Array | None = None,
) -> tuple[Float[Array, "B F H W C"], tuple[Array, ...], Rings]:
    """Noise -> (clean latents of one block, the velocity of each step, updated rings).

    Step i attends to ring i, which holds this very noise level's keys (paper, timestep-forcing). With a
    shared ring (clean or fixed-noise history), one more forward overwrites the block's keys at the end.
    """
    audio = encode_audio(dit.audio_encoder, inputs.audio)
    shared = len(rings) < len(session.times)
    updated = list(rings)

    def forward(x: Array, times: Times, ring: int, sink_rope: Rope) -> Array:
        velocity, updated[ring] = stream_forward(
            dit,
            updated[ring],
            x,
            times,
            session.text,
            audio,
            plan.slot,
            plan.rope,
            sink_rope,
            pose_BFHWC=inputs.pose,
            actor_mask_BPFHW=session.actor_mask,
        )
        return velocity

    x, velocities = noise_BFHWC, []
    for step, times in enumerate(session.times):
        velocity = forward(x, times, 0 if shared else step, plan.sink_ropes[step])
        velocities.append(velocity)
        x = euler_step(x, velocity, session.sigmas[step], session.sigmas[step + 1])
    if session.history_times is not None:
        history = (
            x if history_noise_BFHWC is None else add_noise(x, history_noise_BFHWC, session.history_sigma)
        )
        forward(history, session.history_times, 0, plan.sink_ropes[-1])
    return x, tuple(velocities), tuple(updated)
