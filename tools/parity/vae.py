"""Golden case 09: the Wan 2.1 VAE, whole clips and streams, with weights through the converter."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from lavatar_jax.checkpoints.convert import convert
from lavatar_jax.checkpoints.tables_vae import WAN21_RULES
from lavatar_jax.config import VAEConfig
from lavatar_jax.models.vae import CausalVAE, make_vae, to_pixels

Comparison = tuple[str, np.ndarray, np.ndarray, float, float]


def load_vae(case_dir: Path) -> CausalVAE:
    case = json.loads((case_dir / "case.json").read_text())
    published = case["config"]
    config = VAEConfig(
        kind="wan21",
        width=published["dim"],
        multipliers=tuple(published["dim_mult"]),
        res_blocks=published["num_res_blocks"],
        temporal_downsample=tuple(published["temperal_downsample"]),
        latent_channels=published["z_dim"],
        latent_mean=tuple(case["mean"]),
        latent_std=tuple(case["std"]),
    )
    model = jax.eval_shape(lambda: make_vae(config, rngs=nnx.Rngs(0)))
    return convert(load_file(case_dir / "weights.safetensors"), WAN21_RULES, model)


def check(case_dir: Path) -> Iterator[Comparison]:
    """Yield (name, ours, reference, rtol, atol) of every output of the case."""
    case = json.loads((case_dir / "case.json").read_text())
    inputs = load_file(case_dir / "inputs.safetensors")
    want = load_file(case_dir / "outputs.safetensors")
    tolerance = case["tolerance"]["float32"]
    vae = load_vae(case_dir)
    video, latent = channels_last(inputs["video"]), channels_last(inputs["z"])

    def compare(name: str, got: jax.Array | np.ndarray) -> Comparison:
        return name, np.asarray(got), channels_last(want[name]), tolerance["rtol"], tolerance["atol"]

    encode = jax.jit(CausalVAE.encode)
    yield compare("enc_video", encode(vae, video))
    yield compare("enc_first_frame", encode(vae, video[:, :1]))
    yield compare("enc_frame_x5", encode(vae, np.repeat(video[:, :1], 5, axis=1)))

    decoded = jax.jit(CausalVAE.decode)(vae, latent)
    yield compare("dec_full", decoded)
    absmax = np.abs(to_pixels(decoded)).max(keepdims=True).reshape(1)
    yield "dec_clamped_absmax", absmax, want["dec_clamped_absmax"], tolerance["rtol"], tolerance["atol"]

    decode_step = jax.jit(CausalVAE.stream_decode, static_argnames="first")
    start = case["stream_prime"]
    cache = vae.init_decode_cache(1, *latent.shape[2:4])
    _, cache = decode_step(vae, latent[:, :start], cache, first=True)
    for number, frames in enumerate(case["stream_blocks"], start=1):
        block, cache = decode_step(vae, latent[:, start : start + frames], cache, first=False)
        yield compare(f"stream_block{number}", block)
        start += frames

    encode_step = jax.jit(CausalVAE.stream_encode, static_argnames="first")
    cache = vae.init_encode_cache(1, *video.shape[2:4])
    chunk, cache = encode_step(vae, video[:, :1], cache, first=True)
    chunks = [chunk]
    for begin in range(1, video.shape[1], 4):
        chunk, cache = encode_step(vae, video[:, begin : begin + 4], cache, first=False)
        chunks.append(chunk)
    yield compare("stream_enc", np.concatenate(chunks, axis=1))


channels_last = functools.partial(np.moveaxis, source=1, destination=-1)
