"""The pipeline with its decoder as one program over all devices.

`Pipeline` runs the denoising ring as one program and the decoder as another. Here the decoder is the last
stage of the same program: every device takes the branch of its stage. The price is that the decoder's device
carries weights and rings it never uses, that frames come in lockstep with the ring, and that stages cannot be
split over a tensor axis (collectives inside a branch deadlock).

This is meant for meshes that span hosts, all of which would launch the same thing. So far it runs in one
process, as `Pipeline` does: what the host gives to the program and takes from it (packets, slots, frames) are
arrays of one process.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lavatar_jax.inference.decode import StreamDecoder
from lavatar_jax.inference.denoise import Rings
from lavatar_jax.inference.pipeline import Feed, Finished, Pipeline, SlotState
from lavatar_jax.inference.stage import Packet, Steps, receive, run_stage
from lavatar_jax.models.attention import KV
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.vae import CausalVAE, to_pixels
from lavatar_jax.parallel import STAGE, PipelineLayout, stage_mesh
from lavatar_jax.types import Conditions


class OneProgramPipeline(Pipeline):
    """As `Pipeline`, for layouts with a decoder of its own and one device a stage.

    Raises ValueError for other layouts, for early exits and for saving, which it does not have.
    """

    def _make_mesh(self, devices: list[jax.Device]) -> Mesh:
        if not self.layout.own_decoder or self.layout.tensor > 1:
            raise ValueError("one program for all needs a decoder of its own and no tensor axis")
        return stage_mesh(PipelineLayout(stages=self.layout.stages + 1, own_decoder=False), devices)

    def _pad_steps(self, steps: Steps) -> Steps:
        """The decoder's stage needs some step, which it never runs."""

        def pad(x: Any) -> np.ndarray:
            x = np.asarray(x)
            return np.concatenate([x, x[-x.shape[0] // self.layout.stages :]])

        return jax.tree.map(pad, steps)

    def _compile_tick(self) -> Any:
        self.vae = jax.device_put(self.vae, self._sharding(P()))
        cache = self.vae.init_decode_cache(self.slots, self.height, self.width)
        self._caches = jax.tree.map(lambda x: self._broadcast_stages(np.asarray(x)), cache)
        self._drop = [0] * self.slots
        stage = jax.tree.map(lambda _: P(STAGE), (self.rings, self._caches, self._packet))
        fresh = stage[2]
        whole = jax.tree.map(lambda _: P(), (self.dit, self.vae, self.text, self.actor_mask))
        body = functools.partial(
            _tick, stages=self.layout.stages, use_mask=self.speakers > 1, batch=self.slots
        )
        mapped = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(*whole, self._step_specs, *stage, fresh, P()),
            out_specs=(P(STAGE), P(STAGE), *stage),
            check_vma=False,
        )
        # As in Pipeline: results lie where the arguments lay, so that the next tick does not recompile.
        kept = jax.tree.map(lambda x: x.sharding, (self.rings, self._caches, self._packet))
        merged = self._sharding(P(STAGE))
        return jax.jit(mapped, donate_argnums=(5, 6, 7), out_shardings=(merged, merged, *kept))

    def tick(self, feeds: Mapping[int, Feed] | None = None) -> list[Finished]:
        """As in `Pipeline`; a block comes out with its frames, one tick after its last step."""
        feeds = feeds or {}
        if any(feed.exit_stage is not None for feed in feeds.values()):
            raise ValueError("one program for all has no early exits")
        fresh = self._enter(feeds)
        leaving = self.in_flight[-1]
        valid = np.array([slot in leaving for slot in range(self.slots)])
        latent, frames, self.rings, self._caches, self._packet = self._tick(
            self.dit, self.vae, self.text, self.actor_mask, self._steps,
            self.rings, self._caches, self._packet, fresh, jax.device_put(valid, self._sharding(P())),
        )  # fmt: skip
        result = []
        for slot, block in leaving.items():
            rows = slice(slot, slot + 1)
            shown = self._of_stage(frames, self.stages - 1)[rows, self._drop[slot] :]
            self._drop[slot] = 0
            own = self._of_stage(latent, self.stages - 1)[rows]
            result.append(Finished(slot, block.index, own, frames=shown))
        return result

    def open(self, slot: int, conditions: Conditions) -> None:
        super().open(slot, conditions)
        decoder = self.decoders[slot]
        assert decoder is not None
        cache, self._drop[slot] = decoder.state()
        row = (self.stages - 1) * self.slots + slot
        self._caches = jax.tree.map(
            lambda all_rows, own: jax.device_put(
                all_rows.at[row].set(jax.device_put(own[0], self._sharding(P()))), all_rows.sharding
            ),
            self._caches,
            cache,
        )

    def _make_decoder(self, conditions: Conditions) -> StreamDecoder:
        still = jax.device_put(conditions.still, self._sharding(P()))
        return StreamDecoder(self.vae, still, self.sampling.drop_first_frames)

    def decode(self, block: Finished) -> Float[Array, "1 T H W 3"]:
        """The frames that came with the block."""
        if block.frames is None:
            raise ValueError("this block is not from a one-program pipeline")
        return block.frames

    def save(self, slot: int) -> SlotState:
        raise ValueError("a one-program pipeline cannot save its videos: use Pipeline")

    def load(self, slot: int, state: SlotState) -> None:
        raise ValueError("a one-program pipeline cannot load videos: use Pipeline")


def _tick(
    dit: CausalDiT,
    vae: CausalVAE,
    text: KV,
    actor_mask: Array,
    steps: Steps,
    rings: Rings,
    caches: Any,
    received: Packet,
    fresh: Packet,
    valid: Array,
    *,
    stages: int,
    use_mask: bool,
    batch: int,
) -> tuple[Array, Array, Rings, Any, Packet]:
    """The local view of one device: a denoising step, or on the last one the decoder."""
    packet = receive(fresh, received)

    def decode(latent: Array, caches: Any) -> tuple[Array, Any]:
        video, new = vae.stream_decode(latent, caches, first=False)
        keep = jax.tree.map(
            lambda old, x: jnp.where(valid.reshape(-1, *(1,) * (x.ndim - 1)), x, old), caches, new
        )
        return to_pixels(video), keep

    frames = jax.eval_shape(decode, packet.latent, caches)[0]

    def denoising(rings: Rings, caches: Any) -> tuple[Array, Array, Rings, Any]:
        latent, _, new = run_stage(dit, text, actor_mask if use_mask else None, steps, rings, packet, batch)
        return latent, jnp.zeros(frames.shape, frames.dtype), new, caches

    def decoding(rings: Rings, caches: Any) -> tuple[Array, Array, Rings, Any]:
        video, new = decode(packet.latent, caches)
        return packet.latent, video, rings, new

    is_decoder = jax.lax.axis_index(STAGE) == stages
    latent, video, rings, caches = jax.lax.cond(is_decoder, decoding, denoising, rings, caches)
    packet = packet._replace(latent=latent)
    hops = [(i, i + 1) for i in range(stages)]
    return latent, video, rings, caches, jax.tree.map(lambda x: jax.lax.ppermute(x, STAGE, hops), packet)
