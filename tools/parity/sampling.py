"""Cases 08a, 08b (whole videos through the rollout), 08c (schedule) and 12 (image size and crop)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lavatar_jax.checkpoints.convert import convert
from lavatar_jax.checkpoints.tables_vae import WAN21_RULES
from lavatar_jax.config import RELEASE_SINGLE, RELEASE_TPP, SamplingConfig, VAEConfig
from lavatar_jax.diffusion import FlowSchedule, euler_step
from lavatar_jax.inference.conditions import image_conditions, to_signed
from lavatar_jax.inference.denoise import Rings
from lavatar_jax.inference.images import resize_and_crop, size_less_than_area
from lavatar_jax.inference.pipeline import Pipeline
from lavatar_jax.inference.pipeline_rollout import pipeline_rollout
from lavatar_jax.inference.rollout import Draws, rollout
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.types import BlockInput, Conditions
from tools.parity.case import EXACT, Case, Check, Tolerance, first, last, load_dit, pad_text, with_prefix


class _RecordedDraws(Draws):
    """The case's noise and sink distances instead of our random numbers."""

    def __init__(self, case: Case, want: dict[str, np.ndarray], sampling: SamplingConfig) -> None:
        self.sampling, self.case, self.want = sampling, case, want

    def noise(self, block: int) -> Any:
        clip, index = divmod(block, self.case["n_blocks"])
        noise = last(self.want[f"noise.c{clip}"])[None]
        return jnp.asarray(noise[:, 3 * index : 3 * index + 3])

    def distances(self, block: int) -> list[int]:
        clip, index = divmod(block, self.case["n_blocks"])
        return self.case["relative_dist"][clip][index]


def _load_vae(case: Case) -> CausalVAE:
    kwargs = case["vae_config"]
    config = VAEConfig(
        width=kwargs["dim"],
        latent_channels=kwargs["z_dim"],
        multipliers=tuple(kwargs["dim_mult"]),
        res_blocks=kwargs["num_res_blocks"],
        temporal_downsample=tuple(kwargs["temperal_downsample"]),
        latent_mean=tuple(case["vae_mean"]),
        latent_std=tuple(case["vae_std"]),
    )
    abstract = jax.eval_shape(lambda: make_vae(config, rngs=nnx.Rngs(0)))
    return convert(with_prefix(case.weights, "vae."), WAN21_RULES, abstract)


def _sampling(case: Case, preset: SamplingConfig, changes: dict[str, Any]) -> SamplingConfig:
    return dataclasses.replace(
        preset,
        ring_blocks=case["n_blocks"],
        clip_blocks=case["n_blocks"],
        motion_copies=case["motion_frames"][0] * preset.reference_copies,
        prime_latents=min(preset.prime_latents, case["motion_frames"][1]),
        **changes,
    )


def _inputs(
    case: Case, dit: CausalDiT, vae: CausalVAE, sampling: SamplingConfig
) -> tuple[Conditions, list[BlockInput]]:
    rows, columns = case["image_hw"]
    height, width = size_less_than_area(rows, columns, case["max_area"])
    pixels = resize_and_crop(case.inputs["image"], height, width)
    text = pad_text([case.inputs["context"]], dit.config.text_len)
    conditions = image_conditions(dit.config, vae, sampling, pixels, jnp.asarray(text))
    audio = case.inputs["audio_emb"][None]
    pieces = [audio[..., 12 * b : 12 * b + 12] for b in range(audio.shape[-1] // 12)]
    return conditions, [BlockInput(jnp.asarray(piece)) for piece in pieces]


Outputs = dict[str, dict[str, np.ndarray]]  # of a case, by variant


def _whole_video(
    case: Case, outputs: Outputs, preset: SamplingConfig, variants: dict[str, dict[str, Any]]
) -> Iterator[Check]:
    dit, vae = load_dit(case, "dit."), _load_vae(case)
    tolerance, video_tolerance = case.tolerance("flow/latents"), case.tolerance("video")
    for variant, want in outputs.items():
        recorded = {**outputs[""], **want}
        sampling = _sampling(case, preset, variants[variant])
        conditions, blocks = _inputs(case, dit, vae, sampling)
        sinks: list[tuple[Any, Any]] = []
        steps = rollout(
            dit,
            vae,
            conditions,
            blocks,
            sampling,
            draws=_RecordedDraws(case, recorded, sampling),
            on_sink=lambda *sink, sinks=sinks: sinks.append(sink),
        )
        latents, frames = [], []
        for block in steps:
            clip, index = divmod(block.index, case["n_blocks"])
            for step, velocity in enumerate(block.velocities):
                key = f"flow.c{clip}.b{index}.s{step}"
                yield Check(key, first(velocity[0]), want[key], tolerance, variant)
            latents.append(block.latent)
            if block.frames is not None:
                frames.append(np.asarray(block.frames[0]))
            if block.index == len(blocks) - 1:
                yield from _ring_checks(block.rings, want, variant, tolerance)
        for number, (reference, motion) in enumerate(sinks):
            for name, value in (("ref", reference), ("motion", motion)):
                key = f"{name}_latents_sink{number}"
                if key in want:
                    yield Check(key, first(value), want[key], tolerance, variant)
        yield from _latent_checks(case, latents, want, variant, tolerance)
        yield from _video_checks(case, frames, want, variant, video_tolerance)


def _latent_checks(
    case: Case, latents: list[Any], want: dict[str, np.ndarray], variant: str, tolerance: Tolerance
) -> Iterator[Check]:
    for clip in range(case["n_clips"]):
        key = f"latents.c{clip}"
        if key in want:
            piece = latents[clip * case["n_blocks"] : (clip + 1) * case["n_blocks"]]
            got = first(jnp.concatenate(piece, axis=1)[0])
            yield Check(key, got, want[key], tolerance, variant)


def _video_checks(
    case: Case, frames: list[np.ndarray], want: dict[str, np.ndarray], variant: str, tolerance: Tolerance
) -> Iterator[Check]:
    video = np.concatenate(frames)
    got = {
        "video_kept": first(video[case["video_frames_kept"]]),
        "video_frame_mean": video.mean(axis=(1, 2)).T,
        "video_frame_std": video.std(axis=(1, 2), ddof=1).T,
    }
    for key, value in got.items():
        if key in want:
            yield Check(key, value, want[key], tolerance, variant)


def _ring_checks(
    rings: Rings, want: dict[str, np.ndarray], variant: str, tolerance: Tolerance
) -> Iterator[Check]:
    for key in want:
        if not key.startswith(("kv.", "cond.")):
            continue
        kind, *where, part = key.split(".")
        ring, layer = rings[int(where[0][1:]) if kind == "kv" else 0], int(where[-1][1:])
        n_sink = ring.sink_tokens
        if kind == "kv":
            got = getattr(ring, part)[layer, :, n_sink:]
        else:
            got = ring.sink_k[layer] if part == "k" else ring.v[layer, :, :n_sink]
        yield Check(key, got, want[key], tolerance, variant)


def single_gpu(case: Case) -> Iterator[Check]:
    online = {"adapt_sink_after": case["n_blocks"], "adapt_motion": True}
    yield from _whole_video(case, dict(case.outputs()), RELEASE_SINGLE, {"": online, "noaas": {}})


def tpp(case: Case) -> Iterator[Check]:
    """The sequential rollout, then the pipeline itself: four stages and a decoder (5 devices)."""
    changes = {"adapt_sink_after": case["n_blocks"]}
    outputs = dict(case.outputs())
    yield from _whole_video(case, outputs, RELEASE_TPP, {"": changes})
    dit, vae = load_dit(case, "dit."), _load_vae(case)
    sampling = _sampling(case, RELEASE_TPP, changes)
    conditions, blocks = _inputs(case, dit, vae, sampling)
    height, width = conditions.reference.shape[2:4]
    devices = jax.devices("cpu")  # five virtual ones; a machine with accelerators may have fewer of them
    pipeline = Pipeline(dit, vae, sampling, height=height, width=width, devices=devices)
    want = outputs[""]
    made = list(pipeline_rollout(pipeline, conditions, blocks, draws=_RecordedDraws(case, want, sampling)))
    tolerance = case.tolerance("flow/latents")
    yield from _latent_checks(case, [np.asarray(b.latent) for b in made], want, "pipeline", tolerance)
    frames = [np.asarray(block.frames[0]) for block in made]
    yield from _video_checks(case, frames, want, "pipeline", case.tolerance("video"))


def euler(case: Case) -> Iterator[Check]:
    want, tolerance = dict(case.outputs())[""], case.tolerance("float32")
    for number, (steps, shift) in enumerate(case["combos"]):
        schedule = FlowSchedule(steps=steps, shift=shift)
        yield Check(f"timesteps_{number}", schedule.timesteps, want[f"timesteps_{number}"], tolerance)
        yield Check(f"sigmas_{number}", schedule.sigmas, want[f"sigmas_{number}"], tolerance)
        x = jnp.asarray(case.inputs["x"])
        for step in range(steps):
            sigma, after = schedule.sigmas[step : step + 2]
            x = euler_step(x, jnp.asarray(case.inputs[f"v{step}"]), sigma, after)
        yield Check(f"x_{number}_final", x, want[f"x_{number}_final"], tolerance)


def image_size(case: Case) -> Iterator[Check]:
    keys = ("H", "W")
    sizes = [size_less_than_area(row["h"], row["w"], row["max_area"]) for row in case["rows"]]
    yield Check(
        "sizes", np.array(sizes), np.array([[row[key] for key in keys] for row in case["rows"]]), EXACT
    )
    image = resize_and_crop(case.inputs["image"], *case["image_target"])
    want = dict(case.outputs())[""]["ref_pixel_values"]
    yield Check("ref_pixel_values", np.moveaxis(to_signed(image), -1, 0), want, case.tolerance("image"))
