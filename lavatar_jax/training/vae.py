"""Stage 0: the VAE, on crops and whole pictures of short clips."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lavatar_jax.checkpoints.runs import read_average
from lavatar_jax.config import VAEConfig
from lavatar_jax.data.clips import ClipsConfig, clip_batches, render_clips, unpack
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.training.loop import LoopConfig, fit
from lavatar_jax.training.optim import make_optimizer
from lavatar_jax.training.state import LossFn, Params, TrainState, create_state, make_train_step, split_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAELossConfig:
    gradient: float = 0.5  # L1 of differences between neighbouring pixels: sharp edges
    temporal: float = 0.5  # L1 of differences between neighbouring frames: blinks, lips, no flicker
    kl: float = 1e-4  # per latent element, relative to the mean over pixels
    latent_noise: float = 0.0  # of the decoder's input, in standard deviations of each channel
    decoder_only: bool = False  # fine-tune the decoder; the latent space stays what it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAERun:
    """Everything that `train.py` can set for stage 0."""

    out: str = "runs/vae"
    init: str | None = None  # another VAE run whose averaged weights to start from
    model: VAEConfig
    data: ClipsConfig
    loss: VAELossConfig
    train: LoopConfig


def weighted_mean(error: Float[Array, "B T H W C"], weight: Float[Array, "B T H W 1"]) -> Array:
    return jnp.sum(error * weight) / (jnp.sum(weight) * error.shape[-1])


def reconstruction_loss(
    output: Float[Array, "B T H W 3"],
    video: Float[Array, "B T H W 3"],
    weight: Float[Array, "B T H W 1"],
    config: VAELossConfig,
) -> tuple[Array, dict[str, Array]]:
    """Weighted L1 of pixels, of their differences to the neighbours in space, and of those in time."""
    error = output - video
    pixel = weighted_mean(jnp.abs(error), weight)
    down = weighted_mean(jnp.abs(error[:, :, 1:] - error[:, :, :-1]), weight[:, :, 1:])
    right = weighted_mean(jnp.abs(error[:, :, :, 1:] - error[:, :, :, :-1]), weight[:, :, :, 1:])
    later = weighted_mean(jnp.abs(error[:, 1:] - error[:, :-1]), weight[:, 1:])
    loss = pixel + config.gradient * (down + right) + config.temporal * later
    psnr = -10.0 * jnp.log10(jnp.mean(jnp.square(0.5 * error)))
    return loss, {"l1": pixel, "temporal_l1": later, "psnr": psnr}


def make_loss(merge, config: VAELossConfig) -> LossFn:
    """`loss(params, batch, key)` of `make_train_step`, for batches of `clip_batches`."""

    def loss_fn(params: Params, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        model: CausalVAE = merge(params)
        video, weight = unpack(batch)
        mean, log_variance = model.encode_distribution(video)
        if config.decoder_only:
            mean, log_variance = jax.lax.stop_gradient((mean, log_variance))
        sample_key, noise_key = jax.random.split(key)
        latent = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(sample_key, mean.shape)
        if config.latent_noise:
            spread = jnp.std(jax.lax.stop_gradient(mean), axis=(0, 1, 2, 3))
            latent = latent + config.latent_noise * spread * jax.random.normal(noise_key, mean.shape)
        loss, metrics = reconstruction_loss(model.decode(latent), video, weight, config)
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        return loss + config.kl * kl, {**metrics, "kl": kl, "latent_std": jnp.std(mean)}

    return loss_fn


def train_vae(config: VAERun) -> TrainState:
    """Render the clips if needed, then train (or go on with) the VAE of `config.out`."""
    render_clips(config.data)
    params, merge = split_model(make_vae(config.model, rngs=nnx.Rngs(config.train.seed)))
    if config.init:
        params = {name: jnp.asarray(value) for name, value in read_average(Path(config.init)).items()}
    optimizer = make_optimizer(params, weight_decay=config.train.weight_decay)
    step_fn = make_train_step(make_loss(merge, config.loss), optimizer, config.train.ema_decay)
    return fit(
        step_fn, create_state(params, optimizer, config.train.seed), clip_batches(config.data), config.train,
        Path(config.out),
    )  # fmt: skip
