"""Timestep-forcing pipeline parallelism: every denoising step lives on its own device (paper section 3.2).

A block enters stage 0 as noise, runs that stage's step against the stage's own ring of keys, and hops on;
after the last stage it is decoded. Only packets move. All stages run the same program (`stage_tick`) under
shard_map; what a stage does to a packet is `denoise_block` with that stage's share of the steps, so a
pipeline of one stage is the sequential rollout.

Rows of the batch are `slots`: independent videos, each at its own block. A row without a block in a tick
still computes (a bubble), but at the ring slot that its next block will overwrite before attending to it,
so a bubble changes nothing and costs no masking. Slots do not disturb each other, bit for bit, but for one
case: 8-bit layers scale activations by the largest of a call, which all rows share.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lavatar_jax.config import SamplingConfig
from lavatar_jax.inference.decode import StreamDecoder
from lavatar_jax.inference.denoise import Rings, init_rings, plan_block, schedule, uses_motion
from lavatar_jax.inference.stage import (
    Packet,
    Steps,
    row_of,
    row_writer,
    set_text,
    sink_of,
    sink_writer,
    stage_tick,
)
from lavatar_jax.models.attention import KV, RingCache
from lavatar_jax.models.dit import CausalDiT, Times, timestep_sinusoid
from lavatar_jax.models.rope import Rope
from lavatar_jax.models.vae import CausalVAE
from lavatar_jax.parallel import STAGE, TENSOR, PipelineLayout, place_model, stage_mesh, take_devices
from lavatar_jax.types import BlockInput, Conditions


@dataclasses.dataclass(frozen=True)
class Feed:
    """A block that enters the pipeline in one slot. Arrays have a batch axis of 1."""

    index: int  # block number in its video
    noise: Array
    inputs: BlockInput
    distances: list[int]  # of the sink, for each step
    exit_stage: int | None = None  # also report what this stage takes for the clean latent


@dataclasses.dataclass(frozen=True)
class _Passenger:
    """A block on its way through the stages."""

    index: int
    exit_stage: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """A block that left the last stage; or, `early`, what an earlier one (`Feed.exit_stage`) made of it.

    An early block goes on through the stages, so that every ring remembers it, and is reported again at the
    end. Fewer steps, shown sooner: a way to shorten the wait for a first frame.
    """

    slot: int
    index: int
    latent: Float[Array, "1 F H W C"]
    early: bool = False
    frames: Float[Array, "1 T H W 3"] | None = None  # where the pipeline's own program decodes


class SlotState(NamedTuple):
    """Everything a slot's video needs to go on, on another pipeline too: arrays and plain numbers."""

    next_block: int
    rings: RingCache  # of every step: leaves [steps, L, 1, ...]
    text: KV
    actor_mask: np.ndarray
    decoder: Any  # cache of the streaming decoder
    drop_frames: int  # of the decoder's next block


@dataclasses.dataclass
class _Change:
    """A write into the rings of a slot that takes effect behind its last block, stage after stage."""

    slot: int
    write: Callable[[np.ndarray], None]  # told which stages [stage] bool
    next_stage: int = 0


class Pipeline:
    """The denoising ring on a mesh, and a streaming decoder for each slot.

    `height`, `width`: latent size. `speakers`: rows of audio for each slot. `layout`: see PipelineLayout;
    `devices` default to all. Raises ValueError for sampling that only the sequential rollout can do, or for
    devices of more than one process, and UserError when there are too few devices.
    """

    def __init__(
        self,
        dit: CausalDiT,
        vae: CausalVAE,
        sampling: SamplingConfig,
        *,
        height: int,
        width: int,
        slots: int = 1,
        speakers: int = 1,
        layout: PipelineLayout | None = None,
        devices: list[jax.Device] | None = None,
    ) -> None:
        layout = layout or PipelineLayout(stages=sampling.steps)
        found = take_devices(layout.devices, devices)
        _check(sampling, layout, found)
        self.sampling, self.layout, self.slots, self.speakers = sampling, layout, slots, speakers
        self.height, self.width, self.config = height, width, dit.config
        self.mesh = self._make_mesh(found)
        self.stages = self.mesh.shape[STAGE]
        self.decoder_device = found[-1]
        self.dit = place_model(dit, self.mesh)
        self.vae = jax.device_put(vae, self.decoder_device)
        self.decoders: list[StreamDecoder | None] = [None] * slots
        # Whose block each stage holds, newest first; the host knows without asking the devices.
        self.in_flight: list[dict[int, _Passenger]] = [{} for _ in range(self.stages)]
        self._next_block = [0] * slots
        self._changes: list[_Change] = []
        self._init_state()

    # ---- state -------------------------------------------------------------------------------------------

    def _make_mesh(self, devices: list[jax.Device]) -> Mesh:
        return stage_mesh(self.layout, devices)

    def _init_state(self) -> None:
        stages, config, sampling = self.stages, self.config, self.sampling
        local_steps = sampling.steps // self.layout.stages
        dtype = self.dit.dtype

        def rings() -> Rings:
            all_layers = dataclasses.replace(config, layers=stages * config.layers)
            share = dataclasses.replace(sampling, steps=local_steps)
            return init_rings(all_layers, share, self.slots, self.height, self.width, dtype)

        ring_specs = _ring_specs(local_steps)
        self.rings: Rings = jax.jit(rings, out_shardings=self._shardings(ring_specs))()
        self._steps, self._step_specs = self._stage_steps()
        text = (config.layers, self.slots, config.text_len, config.heads, config.head_dim)
        heads = P(None, None, None, TENSOR, None)

        def zeros() -> KV:
            return KV(jnp.zeros(text, dtype), jnp.zeros(text, dtype))

        self.text: KV = jax.jit(zeros, out_shardings=self._sharding(heads))()
        self._set_text = jax.jit(set_text, donate_argnums=1, out_shardings=self._sharding(heads))
        self._sink_writer = sink_writer(self.mesh, self.rings)
        self._row_writer = row_writer(self.mesh, self.rings)
        rows, columns = self.height // config.patch, self.width // config.patch
        mask = (self.slots, self.speakers, config.block_frames, rows, columns)
        self.actor_mask = jax.device_put(np.ones(mask, np.float32), self._sharding(P()))
        idle = self._host_packet({})
        self._packet = jax.tree.map(self._broadcast_stages, idle)  # donated at every tick
        self._idle = jax.tree.map(self._broadcast_stages, idle)
        self._idle_shards = jax.tree.map(
            lambda x: {shard.device: shard.data for shard in x.addressable_shards}, self._idle
        )
        self._tick = self._compile_tick()

    def _stage_steps(self) -> tuple[Steps, Steps]:
        """Embedded timesteps and noise levels, merged over stages, and their partition."""
        config, stages = self.config, self.layout.stages
        local = self.sampling.steps // stages
        steps = schedule(self.sampling)

        def embed(dit: CausalDiT, timesteps: np.ndarray) -> Times:
            grid = np.repeat(timesteps[:, None], config.block_frames, axis=1)
            return dit.embed_time(jnp.asarray(timestep_sinusoid(grid, config.freq_dim)))

        by_stage = np.asarray(steps.timesteps, np.float64).reshape(stages, local)
        times = tuple(
            jax.jit(functools.partial(embed, timesteps=by_stage[:, j]))(self.dit) for j in range(local)
        )
        sigmas = np.stack([steps.sigmas[s * local : (s + 1) * local + 1] for s in range(stages)])
        value = self._pad_steps(Steps(times, jnp.asarray(sigmas.reshape(-1), jnp.float32)))
        specs = jax.tree.map(lambda _: P(STAGE), value)
        return jax.device_put(value, self._shardings(specs)), specs

    def _pad_steps(self, steps: Steps) -> Steps:
        return steps

    def _sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _shardings(self, specs: Any) -> Any:
        return jax.tree.map(self._sharding, specs, is_leaf=lambda s: isinstance(s, P))

    def _broadcast_stages(self, x: np.ndarray) -> Array:
        merged = np.broadcast_to(x, (self.stages, *x.shape)).reshape(-1, *x.shape[1:])
        return jax.device_put(merged, self._sharding(P(STAGE)))

    # ---- one tick ----------------------------------------------------------------------------------------

    def _compile_tick(self) -> Any:
        specs = jax.tree.map(lambda _: P(STAGE), self._packet)
        ring_specs = jax.tree.map(lambda _: P(STAGE), self.rings)
        replicated = jax.tree.map(lambda _: P(), (self.dit, self.text, self.actor_mask))
        body = functools.partial(
            stage_tick, stages=self.layout.stages, use_mask=self.speakers > 1, batch=self.slots
        )
        mapped = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(*replicated, self._step_specs, ring_specs, specs, specs),
            out_specs=(P(STAGE), specs, ring_specs),
            axis_names={STAGE},  # the tensor axis stays automatic
            check_vma=False,
        )
        # Where results lie is spelled out: left to the compiler it may change, and the next tick recompile.
        out = (
            self._sharding(P(STAGE)),
            self._shardings(specs),
            jax.tree.map(lambda ring: ring.sharding, self.rings),
        )
        # Leaves, because a module is taken apart in Python at every call, which takes as long as the call.
        self._weights, structure = jax.tree.flatten(self.dit)

        def tick_of_leaves(weights: list[Array], *rest: Any) -> Any:
            return mapped(jax.tree.unflatten(structure, weights), *rest)

        return jax.jit(tick_of_leaves, donate_argnums=(4, 5), out_shardings=out)

    def tick(self, feeds: Mapping[int, Feed] | None = None) -> list[Finished]:
        """Every stage does its step and hands on; `feeds` (by slot) enter stage 0.

        Returns the blocks that the last stage finished in this tick. Asynchronous: arrays may still be
        computed when it returns.
        """
        feeds = feeds or {}
        fresh = self._enter(feeds)
        clean, self._packet, self.rings = self._tick(
            self._weights, self.text, self.actor_mask, self._steps, self.rings, self._packet, fresh
        )
        last = self.layout.stages - 1
        return [
            Finished(slot, block.index, self._row(self._of_stage(clean, stage), slot), early=stage != last)
            for stage, blocks in enumerate(self.in_flight)
            for slot, block in blocks.items()
            if stage in (block.exit_stage, last)
        ]

    def _enter(self, feeds: Mapping[int, Feed]) -> Packet:
        """Everybody moves one stage on; `feeds` are in stage 0 now. Returns their packet."""
        for slot, feed in feeds.items():
            if feed.index != self._next_block[slot]:
                raise ValueError(f"slot {slot} expects block {self._next_block[slot]}, not {feed.index}")
        fresh = self._fresh(feeds)
        for slot in feeds:
            self._next_block[slot] += 1
        self._advance_changes()
        last = self.layout.stages - 1
        entered = {
            slot: _Passenger(feed.index, last if feed.exit_stage is None else feed.exit_stage)
            for slot, feed in feeds.items()
        }
        self.in_flight = [entered, *self.in_flight[:-1]]
        return fresh

    def _of_stage(self, merged: Array, stage: int) -> Array:
        """A stage's share of a [stage * B, ...] array, where it lies."""
        first = stage * self.slots
        return next(s.data for s in merged.addressable_shards if (s.index[0].start or 0) == first)

    def _row(self, share: Array, slot: int) -> Array:
        """A slot's row; where there is one only, no program need run for it."""
        return share if self.slots == 1 else share[slot : slot + 1]

    def lower_tick(self) -> jax.stages.Lowered:
        """The tick's program, to compile ahead of time or to look into."""
        state = (self.rings, self._packet, self._idle)
        return self._tick.lower(self._weights, self.text, self.actor_mask, self._steps, *state)

    @property
    def busy(self) -> bool:
        """Whether any block is on its way (the last stage's has already come out)."""
        return any(self.in_flight[:-1])

    def _host_packet(self, feeds: Mapping[int, Feed]) -> Packet:
        """The packet as host arrays; rows without a block get an idle plan."""
        config, steps = self.config, self.sampling.steps
        given = [feeds.get(slot) for slot in range(self.slots)]
        plans = [
            plan_block(
                config,
                self.sampling,
                feed.index if feed else self._next_block[slot],
                self.height,
                self.width,
                feed.distances if feed else [0] * steps,
            )
            for slot, feed in enumerate(given)
        ]
        frames = config.block_frames
        zeros = np.zeros((frames, self.height, self.width, config.latent_channels), np.float32)
        silent = np.zeros((self.speakers, config.audio_layers, config.audio_dim, 4 * frames), np.float32)

        def stack(rows: list[Any]) -> Any:
            return np.stack([np.asarray(row) for row in rows])

        def pose(feed: Feed | None) -> Any:
            return zeros if feed is None or feed.inputs.pose is None else np.asarray(feed.inputs.pose)[0]

        return Packet(
            # The only row's noise stays on its device.
            latent=given[0].noise
            if self.slots == 1 and given[0]
            else stack([np.asarray(feed.noise)[0] if feed else zeros for feed in given]),
            inputs=BlockInput(
                stack([np.asarray(feed.inputs.audio)[0] if feed else silent for feed in given]),
                stack([pose(feed) for feed in given]) if config.use_pose else None,
            ),
            offset=stack([np.int32(plan.slot.offset) for plan in plans]),
            end=stack([np.int32(plan.slot.end) for plan in plans]),
            rope=Rope(*(stack([plan.rope[i] for plan in plans]) for i in range(2))),
            sink_rope=Rope(*(stack([[r[i] for r in plan.sink_ropes] for plan in plans]) for i in range(2))),
        )

    def _fresh(self, feeds: Mapping[int, Feed]) -> Packet:
        """This tick's packet on stage 0; the shards of the other stages are idle ones placed before."""
        packet = self._host_packet(feeds)
        first = list(self.mesh.devices[0])
        placed = [jax.device_put(packet, device) for device in first]  # one call for all arrays: it is faster

        def join(idle: Array, others: dict[jax.Device, Array], *new: Array) -> Array:
            own = others | dict(zip(first, new, strict=True))
            return jax.make_array_from_single_device_arrays(idle.shape, idle.sharding, list(own.values()))

        return jax.tree.map(join, self._idle, self._idle_shards, *placed)

    # ---- sessions ----------------------------------------------------------------------------------------

    def open(self, slot: int, conditions: Conditions) -> None:
        """Start a new video in a slot: its prompt, its sink, a primed decoder, block 0 next.

        Raises ValueError for conditions of other sizes than the pipeline was built for.
        """
        if conditions.reference.shape[2:4] != (self.height, self.width):
            raise ValueError(f"the pipeline was built for latents of {self.height} x {self.width}")
        self._clear(slot, next_block=0)
        self.set_text(slot, conditions.text)
        self._set_mask(slot, conditions.actor_mask)
        self.set_sink(slot, conditions.reference, conditions.motion, at_once=True)
        self.decoders[slot] = self._make_decoder(conditions)

    def _make_decoder(self, conditions: Conditions) -> StreamDecoder:
        still = jax.device_put(conditions.still, self.decoder_device)
        return StreamDecoder(self.vae, still, self.sampling.drop_first_frames)

    def close(self, slot: int) -> None:
        """Forget a slot's video; its blocks in flight never come out."""
        self._clear(slot, next_block=0)
        self.decoders[slot] = None

    def _clear(self, slot: int, next_block: int) -> None:
        self._next_block[slot] = next_block
        self._changes = [change for change in self._changes if change.slot != slot]
        for blocks in self.in_flight:
            blocks.pop(slot, None)

    def save(self, slot: int) -> SlotState:
        """A slot's state as host arrays, once its blocks have come out. Raises ValueError before that."""
        decoder = self.decoders[slot]
        if decoder is None or any(slot in blocks for blocks in self.in_flight[:-1]) or self._changes:
            raise ValueError(
                f"slot {slot} is not open, or blocks of it are in flight: tick until they are out"
            )
        rows = jax.device_get(row_of(self.rings, jnp.int32(slot)))
        stages = self.layout.stages

        def by_step(*shares: np.ndarray) -> np.ndarray:  # of the local steps, [stage * L, ...] each
            split = [share.reshape(stages, self.config.layers, *share.shape[1:]) for share in shares]
            return np.stack(split, axis=1).reshape(
                self.sampling.steps, self.config.layers, *shares[0].shape[1:]
            )

        cache, drop = decoder.state()
        return SlotState(
            next_block=self._next_block[slot],
            rings=jax.tree.map(by_step, *rows),
            text=jax.tree.map(lambda x: np.asarray(x[:, slot : slot + 1]), self.text),
            actor_mask=np.asarray(self.actor_mask[slot : slot + 1]),
            decoder=jax.device_get(cache),
            drop_frames=drop,
        )

    def load(self, slot: int, state: SlotState) -> None:
        """Go on with a saved video in a slot, bit for bit as it would have gone on where it was saved."""
        stages, local = self.layout.stages, len(self.rings)

        def share(leaf: np.ndarray, j: int) -> np.ndarray:
            split = leaf.reshape(stages, local, *leaf.shape[1:])[:, j]
            return split.reshape(-1, *leaf.shape[2:])

        rows = tuple(jax.tree.map(functools.partial(share, j=j), state.rings) for j in range(local))
        if jax.tree.map(np.shape, rows) != jax.tree.map(np.shape, jax.eval_shape(row_of, self.rings, 0)):
            raise ValueError("the rings of a saved video are of another model or size")
        self._clear(slot, next_block=state.next_block)
        placed = jax.device_put(rows, jax.tree.map(lambda ring: ring.sharding, self.rings))
        put = functools.partial(jax.lax.dynamic_update_slice, start_indices=(0, slot, 0, 0, 0))
        new = jax.device_put(state.text, self.text.k.sharding)
        self.text = jax.device_put(jax.tree.map(put, self.text, new), self.text.k.sharding)
        self._set_mask(slot, state.actor_mask)
        cache = jax.device_put(state.decoder, self.decoder_device)
        self.decoders[slot] = StreamDecoder.from_state(self.vae, cache, state.drop_frames)
        # Bubbles of the slot's past are still on their way: they must pass before the rows are written.
        self._changes.append(_Change(slot, functools.partial(self._write_row, slot, placed)))

    def _set_mask(self, slot: int, mask: Any) -> None:
        """Where each speaker is in a slot's video; None: everywhere."""
        masks = np.asarray(self.actor_mask).copy()
        mask = np.ones_like(masks[:1]) if mask is None else np.asarray(mask)
        if mask.shape[1:] != masks.shape[1:]:
            given, built = (f"{list(x.shape[1:])} (speakers, frames, rows, columns)" for x in (mask, masks))
            raise ValueError(f"a mask of {given}: the pipeline was built for {built}")
        if self.speakers == 1 and np.any(mask != 1):
            raise ValueError("a pipeline of one speaker takes no mask: build it with speakers=2")
        masks[slot] = mask[0]
        self.actor_mask = jax.device_put(masks, self._sharding(P()))

    def set_text(self, slot: int, text_1SE: Array) -> None:
        """A prompt for the blocks from now on, those in flight included; what is missing of it is zeros.

        Raises ValueError for one that is longer than the model's `text_len`.
        """
        given, length = text_1SE.shape[1], self.dit.config.text_len
        if given > length:
            raise ValueError(f"a prompt of {given} states, the model takes {length}")
        text = jax.device_put(jnp.pad(text_1SE, [(0, 0), (0, length - given), (0, 0)]), self._sharding(P()))
        self.text = self._set_text(self.dit, self.text, text, jnp.int32(slot))

    def set_sink(
        self, slot: int, reference: Array, motion: Array | None = None, *, at_once: bool = False
    ) -> None:
        """A new sink: for all stages `at_once`, or from the next block on, which takes it along."""
        if not self.sampling.sink:
            return
        motion = motion if uses_motion(self.config, self.sampling) else None
        given = jax.device_put((reference, motion), self._sharding(P()))
        sink = sink_of(self.dit, *given, self.text, jnp.int32(slot), half_table=self.sampling.half_rope_table)
        write = functools.partial(self._write_sink, slot, sink)
        if at_once:
            write(np.ones(self.stages, bool))
        else:
            self._changes.append(_Change(slot, write))

    def _advance_changes(self) -> None:
        """A change reaches each stage together with the first packet behind it."""
        for change in self._changes:
            change.write(np.arange(self.stages) == change.next_stage)
            change.next_stage += 1
        self._changes = [change for change in self._changes if change.next_stage < self.stages]

    def _write_sink(self, slot: int, sink: KV, stages: np.ndarray) -> None:
        where = jax.device_put(stages, self._sharding(P(STAGE)))
        self.rings = self._sink_writer(self.rings, sink, jnp.int32(slot), where)

    def _write_row(self, slot: int, rows: Rings, stages: np.ndarray) -> None:
        where = jax.device_put(stages, self._sharding(P(STAGE)))
        self.rings = self._row_writer(self.rings, rows, jnp.int32(slot), where)

    def decode(self, block: Finished) -> Float[Array, "1 T H W 3"]:
        """The frames of a finished block; each slot's blocks in order."""
        decoder = self.decoders[block.slot]
        if decoder is None:
            raise ValueError(f"slot {block.slot} is not open")
        return decoder(jax.device_put(block.latent, self.decoder_device))


def _check(sampling: SamplingConfig, layout: PipelineLayout, devices: list[jax.Device]) -> None:
    if sampling.steps % layout.stages:
        raise ValueError(f"{layout.stages} stages do not divide {sampling.steps} steps evenly")
    if (reason := sampling.why_no_pipeline) is not None:
        raise ValueError(f"a pipeline cannot sample so: {reason}")
    if len({device.process_index for device in devices}) > 1:  # packets and slots are arrays of this one
        raise ValueError("a pipeline runs in one process so far: give it devices of one")


def _ring_specs(count: int) -> Rings:
    spec = P(STAGE, None, None, TENSOR, None)
    return tuple(RingCache(spec, spec, spec) for _ in range(count))  # type: ignore[arg-type]
