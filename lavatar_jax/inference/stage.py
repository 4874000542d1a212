"""What the devices of the pipeline run: a stage's tick, and writes into the rings of a slot.

State arrays merge the stage with their leading axis (`[stage * L, B, S, N, H]`, `[stage * B, ...]`, spec
P("stage")), so that the local view of a stage under shard_map is exactly the single-device code's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lavatar_jax.diffusion import euler_step
from lavatar_jax.inference.denoise import BlockPlan, Rings, Session, denoise_block
from lavatar_jax.models.attention import KV, RingSlot
from lavatar_jax.models.dit import CausalDiT, Times
from lavatar_jax.models.dit_forward import sink_keys_values
from lavatar_jax.models.rope import Rope
from lavatar_jax.parallel import STAGE
from lavatar_jax.types import BlockInput


class Packet(NamedTuple):
    """What travels from stage to stage: a block's latent, its inputs, and its place in time. B: slots."""

    latent: Float[Array, "B F H W C"]
    inputs: BlockInput
    offset: Int[Array, " B"]  # see RingSlot
    end: Int[Array, " B"]
    rope: Rope  # [B, T, half]
    sink_rope: Rope  # [B, steps, C, half]: one for every forward of the block


class Steps(NamedTuple):
    """A stage's share of the denoising steps: what `start_session` embeds, without the text."""

    times: tuple[Times, ...]  # [1, F, D]
    sigmas: Float[Array, " levels"]


def receive(fresh: Packet, received: Packet) -> Packet:
    """What this stage works on: the host's packet in stage 0, elsewhere what hopped here."""
    first = jax.lax.axis_index(STAGE) == 0
    return jax.tree.map(lambda new, old: jnp.where(first, new, old), fresh, received)


def run_stage(
    dit: CausalDiT,
    text: KV,
    actor_mask: Array | None,
    steps: Steps,
    rings: Rings,
    packet: Packet,
    batch: int,
) -> tuple[Array, tuple[Array, ...], Rings]:
    """This stage's share of the steps of a packet -> (latents, velocities, rings)."""
    first = jax.lax.axis_index(STAGE) * len(rings)

    def sink_rope(step: int) -> Rope:
        return Rope(
            *(jax.lax.dynamic_index_in_dim(x, first + step, 1, keepdims=False) for x in packet.sink_rope)
        )

    plan = BlockPlan(
        RingSlot(packet.offset, packet.end), packet.rope, tuple(sink_rope(j) for j in range(len(rings)))
    )
    session = Session(
        text=text,
        times=jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), steps.times),
        sigmas=steps.sigmas,
        history_times=None,
        history_sigma=jnp.float32(0),
        actor_mask=actor_mask,
    )
    return denoise_block(dit, rings, packet.latent, packet.inputs, plan, session)


def stage_tick(
    dit: CausalDiT,
    text: KV,
    actor_mask: Array,
    steps: Steps,
    rings: Rings,
    received: Packet,
    fresh: Packet,
    *,
    stages: int,
    use_mask: bool,
    batch: int,
) -> tuple[Array, Packet, Rings]:
    """The local view of one stage -> (its x0 estimate, the packet for the next stage, its rings).

    The estimate of the last stage is its latent: no noise is left there.
    """
    packet = receive(fresh, received)
    latent, velocities, rings = run_stage(
        dit, text, actor_mask if use_mask else None, steps, rings, packet, batch
    )
    packet = packet._replace(latent=latent)
    hops = [(i, i + 1) for i in range(stages - 1)]
    clean = euler_step(latent, velocities[-1], steps.sigmas[-1], 0.0)
    return clean, jax.tree.map(lambda x: jax.lax.ppermute(x, STAGE, hops), packet), rings


def set_text(dit: CausalDiT, text: KV, states_1SE: Array, slot: Array) -> KV:
    new = dit.text_keys_values(states_1SE)
    return jax.tree.map(
        lambda old, x: jax.lax.dynamic_update_slice(old, x.astype(old.dtype), (0, slot, 0, 0, 0)), text, new
    )


@functools.partial(jax.jit, static_argnames="half_table")
def sink_of(
    dit: CausalDiT, reference: Array, motion: Array | None, text: KV, slot: Array, *, half_table: bool
) -> KV:
    own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, 1), text)
    return sink_keys_values(dit, reference, motion, own, half_table=half_table)


def _on_stages(mesh: Mesh, rings: Rings, write: Callable[..., Rings], given: tuple[P, ...]) -> Any:
    """Compile `write(rings, *given, slot, here)` for all stages; `here` [1] says whether this one is meant.

    The rings are donated and stay where they are.
    """
    specs = jax.tree.map(lambda _: P(STAGE), rings)
    mapped = jax.shard_map(
        write,
        mesh=mesh,
        in_specs=(specs, *given, P(), P(STAGE)),
        out_specs=specs,
        axis_names={STAGE},
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0, out_shardings=jax.tree.map(lambda ring: ring.sharding, rings))


def _put_row(buffer: Array, new: Array, slot: Array, here: Array) -> Array:
    """Overwrite the first tokens of a slot's row where `here`; elsewhere the old ones stay."""
    size = (buffer.shape[0], 1, new.shape[2], *buffer.shape[3:])
    at = (0, slot, 0, 0, 0)
    old = jax.lax.dynamic_slice(buffer, at, size)
    return jax.lax.dynamic_update_slice(buffer, jnp.where(here[0], new.astype(buffer.dtype), old), at)


def sink_writer(mesh: Mesh, rings: Rings) -> Any:
    """Compiled `(rings, sink KV, slot, stages [stage] bool) -> rings`."""

    def write(rings: Rings, sink: KV, slot: Array, here: Array) -> Rings:
        return tuple(
            dataclasses.replace(
                ring, v=_put_row(ring.v, sink.v, slot, here), sink_k=_put_row(ring.sink_k, sink.k, slot, here)
            )
            for ring in rings
        )

    return _on_stages(mesh, rings, write, (P(),))


def row_writer(mesh: Mesh, rings: Rings) -> Any:
    """Compiled `(rings, a slot's rows, slot, stages [stage] bool) -> rings`: restores what `row_of` took."""

    def write(rings: Rings, rows: Rings, slot: Array, here: Array) -> Rings:
        return jax.tree.map(lambda buffer, new: _put_row(buffer, new, slot, here), rings, rows)

    return _on_stages(mesh, rings, write, (jax.tree.map(lambda _: P(STAGE), rings),))


@jax.jit
def row_of(rings: Rings, slot: Array) -> Rings:
    """The rings of one slot, [stage * L, 1, S, N, H]."""
    return jax.tree.map(lambda buffer: jax.lax.dynamic_slice_in_dim(buffer, slot, 1, axis=1), rings)
