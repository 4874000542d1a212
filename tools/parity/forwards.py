"""Cases 06a-06d, 06f and 07: the streaming, training and teacher forwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavatar_jax.models import rope as rp
from lavatar_jax.models.attention import KV, RingCache, init_cache, ring_slot
from lavatar_jax.models.audio_encoder import encode_audio
from lavatar_jax.models.dit import CausalDiT, timestep_sinusoid
from lavatar_jax.models.dit_forward import (
    block_causal_mask,
    cond_tokens,
    prefill_sink,
    stream_forward,
    teacher_forward,
    train_forward,
)
from tools.parity.case import EXACT, Case, Check, Tolerance, first, last, load_dit, pad_text

_step = jax.jit(stream_forward)


class Stream:
    """A model with its sink filled from the case, ready to run one step of one block."""

    def __init__(self, case: Case, model: CausalDiT, ring_tokens: int, *, half: bool) -> None:
        self.case, self.model, self.half, self.ring_tokens = case, model, half, ring_tokens
        self.config = model.config
        self.height, self.width = case["latent_hw"]
        self.text = model.text_keys_values(
            jnp.asarray(pad_text([case.inputs["context"]], self.config.text_len))
        )
        n_sink = cond_tokens(self.config, self.height, self.width, motion=True)
        self.sink = prefill_sink(
            model,
            init_cache(self.config, 1, n_sink, ring_tokens),
            jnp.asarray(last(case.inputs["ref_latents"])),
            jnp.asarray(last(case.inputs["motion_latents"])),
            self.text,
            drop_motion=case.info.get("drop_motion_frames", False),
            half_table=half,
        )

    def step(
        self, cache: RingCache, x: jax.Array, t: float, block: int, distance: int, frame: int | None = None
    ) -> tuple[jax.Array, RingCache]:
        """`block` counts within the case's inputs; `frame`, if given, is its absolute first latent frame."""
        inputs, config, frames = self.case.inputs, self.config, x.shape[1]
        frame = block * frames if frame is None else frame
        rows, columns = self.height // config.patch, self.width // config.patch
        times = self.model.embed_time(
            jnp.asarray(timestep_sinusoid(np.full((1, frames), t), config.freq_dim))
        )
        audio = inputs["audio"][None, ..., 4 * frames * block : 4 * frames * (block + 1)]
        pose = None
        if "cond_states" in inputs:
            pose = jnp.asarray(last(inputs["cond_states"]))[:, frames * block : frames * (block + 1)]
        mask = jnp.asarray(inputs["mask"][None, :, :frames, ..., 0]) if "mask" in inputs else None
        sink_grids = rp.sink_grids(self.height, self.width, config.patch, rp.sink_roll(frame, distance))
        return _step(
            self.model,
            cache,
            x,
            times,
            self.text,
            encode_audio(self.model.audio_encoder, jnp.asarray(audio)),
            ring_slot(frame // frames, frames * rows * columns, self.ring_tokens),
            rp.rope([rp.video_grid(frame, frames, rows, columns)], config.head_dim, half_table=self.half),
            rp.rope(sink_grids, config.head_dim, half_table=self.half),
            pose_BFHWC=pose,
            actor_mask_BPFHW=mask,
        )


def _cache_checks(
    name: str, cache: RingCache, want: dict[str, np.ndarray], tolerance: Tolerance, variant: str
) -> Iterator[Check]:
    for layer in range(cache.k.shape[0]):
        for part, value in (("k", cache.k), ("v", cache.v)):
            key = f"{name}l{layer}.{part}"
            if key in want:
                yield Check(key, value[layer, :, cache.sink_tokens :], want[key], tolerance, variant)


def stream(case: Case) -> Iterator[Check]:
    """Sink prefill, then every step of every block through its own ring."""
    model = load_dit(case)
    noise = jnp.asarray(last(case.inputs["noise"])[None])
    frames, sigmas = case["frames_per_block"], case["sigmas"]
    for variant, want in case.outputs():
        run = Stream(case, model, case["cache_tokens"], half=variant == "ropefp16")
        rings, latents = [run.sink] * case["n_steps"], []
        for block in range(case["n_blocks"]):
            x = noise[:, frames * block : frames * (block + 1)]
            for step, t in enumerate(case["timesteps"]):
                distance = case["relative_dist"][block][step]
                flow, rings[step] = run.step(rings[step], x, t, block, distance)
                key = f"flow.b{block}.s{step}"
                yield Check(key, first(flow[0]), want[key], case.tolerance("flow/latents"), variant)
                x = x + (sigmas[step + 1] - sigmas[step]) * flow
            latents.append(x)
        video = first(jnp.concatenate(latents, axis=1)[0])
        yield Check("latents", video, want["latents"], case.tolerance("flow/latents"), variant)
        for step, ring in enumerate(rings):
            yield from _cache_checks(f"kv.s{step}.", ring, want, case.tolerance("kv"), variant)
        sink = run.sink
        for layer in range(model.config.layers):
            got = KV(sink.sink_k[layer], sink.v[layer, :, : sink.sink_tokens])
            for part, value in got._asdict().items():
                key = f"cond.l{layer}.{part}"
                if key in want:
                    yield Check(key, value, want[key], case.tolerance("kv"), variant)


def late_clip(case: Case) -> Iterator[Check]:
    """Far into a video: a recorded ring, and absolute frames beyond any table."""
    model, tolerance = load_dit(case), case.tolerance("flow")
    x = jnp.asarray(last(case.inputs["x"])[None])
    frames = model.config.block_frames
    for variant, want in case.outputs():
        run = Stream(case, model, case["cache_tokens"], half=variant == "ropefp16")
        n_sink, cache = run.sink.sink_tokens, run.sink
        k, v = cache.k, cache.v
        for layer in range(model.config.layers):
            k = k.at[layer, :, n_sink:].set(case.inputs[f"prek.l{layer}"])
            v = v.at[layer, :, n_sink:].set(case.inputs[f"prev.l{layer}"])
        cache = RingCache(k, v, cache.sink_k)
        for block, distance in enumerate(case["relative_dist"]):
            frame = case["first_frame"] + block * frames
            piece = x[:, frames * block : frames * (block + 1)]
            flow, cache = run.step(cache, piece, case["t"], block, distance, frame)
            yield Check(f"flow.b{block}", first(flow[0]), want[f"flow.b{block}"], tolerance, variant)
        yield from _cache_checks("kv.", cache, want, tolerance, variant)


def train(case: Case) -> Iterator[Check]:
    model, inputs = load_dit(case), case.inputs
    drops: dict[str, Any] = {"dropmotion": "all", "droppart": "part"}
    for variant, want in case.outputs():
        flow = train_forward(
            model,
            jnp.asarray(last(inputs["x"])[None]),
            np.asarray(case["t"]),
            text_BSE=jnp.asarray(pad_text([inputs["context"]], model.config.text_len)),
            audio=jnp.asarray(inputs["audio"])[:, None],
            ref_B1HWC=jnp.asarray(last(inputs["ref_latents"])),
            motion_BFHWC=jnp.asarray(last(inputs["motion_latents"])),
            pose_BFHWC=jnp.asarray(last(inputs["cond_states"])),
            drop_motion=drops.get(variant, "none"),
        )
        yield Check("flow", first(flow[0]), want["flow"], case.tolerance("flow"), variant)
        if "mask" in want:
            frames, tokens = case["n_frames"], case["frame_seqlen"]
            mask = block_causal_mask(
                frames, tokens, len(want["mask"]) - frames * tokens, case["num_frame_per_block"]
            )
            yield Check("mask", mask.astype(np.uint8), want["mask"], EXACT, variant)


def teacher(case: Case) -> Iterator[Check]:
    model, inputs = load_dit(case), case.inputs
    batch = range(case["batch"])
    for variant, want in case.outputs():
        flow = teacher_forward(
            model,
            jnp.asarray(np.stack([last(inputs[f"x_{i}"]) for i in batch])),
            np.asarray(case["t"]),
            text_BSE=jnp.asarray(pad_text([inputs[f"context_{i}"] for i in batch], model.config.text_len)),
            audio_BPLAT=jnp.asarray(inputs["audio"])[:, None],
            ref_B1HWC=jnp.asarray(last(inputs["ref"])),
            motion_BFHWC=None if variant == "dropmotion" else jnp.asarray(last(inputs["motion"])),
            pose_BFHWC=jnp.asarray(last(inputs["cond"])),
            add_last_motion=1 if variant == "addlast1" else 2,
        )
        yield Check("flow", first(flow), want["flow"], case.tolerance("float32"), variant)
