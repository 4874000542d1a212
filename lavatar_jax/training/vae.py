"""Stage 0: the VAE, on crops and whole pictures of short clips."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lavatar_jax.config import VAEConfig
from lavatar_jax.data.batches import Batches
from lavatar_jax.data.clips import ClipsConfig, clip_batches, render_clips, unpack
from lavatar_jax.data.faces import random_training_frames
from lavatar_jax.errors import UserError
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.parallel import batch_shards, train_mesh
from lavatar_jax.training.distributed import first_process_only
from lavatar_jax.training.optim import make_optimizer
from lavatar_jax.training.precision import compute_in
from lavatar_jax.training.run import Run, fit_run, run_step
from lavatar_jax.training.samples import save_moving_pictures, to_host
from lavatar_jax.training.state import LossFn, Merge, Params, TrainState, create_state, release
from lavatar_jax.training.weights import initial_weights

# Luminance, red against blue, green against magenta (columns). The last has little of the variance of RGB,
# and a VAE that starts without it may not find it in a thousand steps: green walls come out grey. So the loss
# looks at it (`VAELossConfig.colour`) and the first convolution hears it louder (`gentle_start`).
OPPONENT = np.array([[1.0, 1.0, 1.0], [1.5, 0.0, -1.5], [-1.5, 3.0, -1.5]], np.float32).T / 3.0
OPPONENT_GAIN = (1.0, 2.0, 5.0)  # about the inverse of their deviations in pictures
CELL = 8  # pixels
ENCODER = ("encoder.", "quant.")  # what makes latents


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAELossConfig:
    square: float = 0.0  # L2 of pixels beside their L1: what PSNR measures; for the last part of a training
    gradient: float = 0.5  # L1 of differences between neighbouring pixels: sharp edges
    colour: float = 1.0  # L1 of opponent colours of 8 x 8 pixel means
    texture: float = 0.0  # L1 of the mean strength of edges in 8 x 8 pixels: what is uncertain is not blurred
    temporal: float = 0.5  # L1 of differences between neighbouring frames: blinks, lips, no flicker
    kl: float = 1e-4  # per latent element, relative to the mean over pixels
    latent_noise: float = 0.0  # of the decoder's input, in standard deviations of each channel
    decoder_only: bool = False  # fine-tune the decoder; the latent space stays what it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAERun(Run):
    """Everything that `train.py` can set for stage 0."""

    out: str = "runs/vae"
    model: VAEConfig
    data: ClipsConfig
    loss: VAELossConfig

    def make(self, rngs: nnx.Rngs) -> CausalVAE:
        return make_vae(self.model, rngs=rngs)


def weighted_mean(error: Float[Array, "B T H W C"], weight: Float[Array, "B T H W 1"]) -> Array:
    return jnp.sum(error * weight) / (jnp.sum(weight) * error.shape[-1])


def cell_means(video: Float[Array, "B T H W C"]) -> Float[Array, "B T H8 W8 C"]:
    """Means over cells of 8 x 8 pixels."""
    batch, frames, height, width, channels = video.shape
    cells = video.reshape(batch, frames, height // CELL, CELL, width // CELL, CELL, channels)
    return cells.mean(axis=(3, 5))


def edges(video: Float[Array, "B T H W C"]) -> Float[Array, "B T H W 1"]:
    """How strong the finest edges are: absolute second differences of the brightness, along x and y."""
    grey = jnp.pad(video.mean(axis=-1), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    centre = 2.0 * grey[:, :, 1:-1, 1:-1]
    along_x = jnp.abs(centre - grey[:, :, 1:-1, :-2] - grey[:, :, 1:-1, 2:])
    along_y = jnp.abs(centre - grey[:, :, :-2, 1:-1] - grey[:, :, 2:, 1:-1])
    return (along_x + along_y)[..., None]


def reconstruction_loss(
    output: Float[Array, "B T H W 3"],
    video: Float[Array, "B T H W 3"],
    weight: Float[Array, "B T H W 1"],
    config: VAELossConfig,
) -> tuple[Array, dict[str, Array]]:
    """Weighted L1 (and L2) of pixels, L1 of their differences to the neighbours in space, and in time, and of
    means over cells: of colours, and of how strong the edges are."""
    error = output - video
    pixel = weighted_mean(jnp.abs(error), weight)
    square = weighted_mean(jnp.square(error), weight)
    down = weighted_mean(jnp.abs(error[:, :, 1:] - error[:, :, :-1]), weight[:, :, 1:])
    right = weighted_mean(jnp.abs(error[:, :, :, 1:] - error[:, :, :, :-1]), weight[:, :, :, 1:])
    later = weighted_mean(jnp.abs(error[:, 1:] - error[:, :-1]), weight[:, 1:])
    colour = jnp.mean(jnp.abs(cell_means(error) @ OPPONENT))
    loss = pixel + config.square * square + config.gradient * (down + right)
    loss = loss + config.temporal * later + config.colour * colour
    metrics = {"l1": pixel, "temporal_l1": later, "colour": colour}
    if config.texture:
        metrics["texture"] = jnp.mean(jnp.abs(cell_means(edges(output)) - cell_means(edges(video))))
        loss = loss + config.texture * metrics["texture"]
    psnr = -10.0 * jnp.log10(jnp.mean(jnp.square(0.5 * error)))
    return loss, {**metrics, "psnr": psnr}


def make_loss(merge: Merge[CausalVAE], config: VAELossConfig) -> LossFn:
    """`loss(params, frozen, batch, key)` of `run_step`, for batches of `clip_batches`."""

    def loss_fn(
        params: Params, frozen: Params, batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        model: CausalVAE = merge(params, frozen)
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


def gentle_start(params: Params, latent_channels: int, key: Array) -> Params:
    """Change fresh weights so that training starts fast.

    Residual branches start small: the parameter-free shortcuts carry the picture from the first step. The
    first biases are not zero, since an RMS norm of the signal alone would forget how bright it is. The first
    convolution sees colours of equal variance. Latents start with little noise (log variance -6).
    """
    axes = OPPONENT / np.linalg.norm(OPPONENT, axis=0)
    equalise = jnp.asarray(axes * OPPONENT_GAIN @ axes.T)  # [colour, colour]

    def change(index: int, name: str, value: Array) -> Array:
        if name.endswith("conv_in.bias"):
            return 0.4 * jax.random.normal(jax.random.fold_in(key, index), value.shape)
        if name == "encoder.conv_in.weight":  # input channels are (colour, column, row)
            by_colour = value.reshape(*value.shape[:3], 3, -1, value.shape[-1])
            return jnp.einsum("dc,tijcpo->tijdpo", equalise, by_colour).reshape(value.shape)
        if name.endswith("outer.conv.weight"):
            return 0.3 * value
        if name == "quant.weight":
            return value.at[:, latent_channels:].multiply(0.1)
        if name == "quant.bias":
            return value.at[latent_channels:].set(-6.0)
        return value

    return {name: change(index, name, value) for index, (name, value) in enumerate(params.items())}


def make_sampler(
    config: VAERun, model_of: Callable[[TrainState], CausalVAE]
) -> Callable[[TrainState, Path], None] | None:
    """`sample` of `loop.fit`: faces of other clips than those of the training, and what the VAE keeps."""
    count, data = config.samples.records, config.data
    if not count:
        return None
    key = jax.random.fold_in(jax.random.key(data.seed), data.clips)  # where no chunk of `render_clips` begins
    render = jax.jit(lambda key: random_training_frames(key, count, data.frames, data.size)[0])
    rebuild = jax.jit(lambda vae, video: vae.decode(vae.encode(video)))

    def sample(state: TrainState, folder: Path) -> None:
        video, vae = np.asarray(render(key)), model_of(state)
        kept = np.concatenate([to_host(rebuild(vae, one[None])) for one in video])
        pairs = np.concatenate([video, kept], axis=3)
        save_moving_pictures(((f"face{index}", pair) for index, pair in enumerate(pairs)), folder)

    return sample


def check_sizes(config: VAERun) -> None:
    """Raises UserError for clips or crops that cannot be cut or encoded."""
    data, latent = config.data, config.model.temporal_factor
    cell = math.lcm(config.model.spatial_factor, CELL)
    if data.clips < 1:
        raise UserError(f"--data.clips must be at least 1, not {data.clips}")
    sizes = {"frames": data.frames, "size": data.size}
    if data.full_share < 1:  # else there are no crops
        sizes |= {"crop-frames": data.crop_frames, "crop-size": data.crop_size}
    for name, value in sizes.items():
        if name.endswith("frames") and (value < 1 or (value - 1) % latent):
            raise UserError(f"--data.{name} must be 1 + {latent}k, not {value}: the VAE is causal")
        if name.endswith("size") and (value < 1 or value % cell):
            raise UserError(f"--data.{name} must be a multiple of {cell} pixels, not {value}")
        if value > (whole := sizes[name.removeprefix("crop-")]):
            raise UserError(f"--data.{name} {value} is larger than the clips, which have {whole}")


def shared_batches(config: VAERun, mesh: Mesh) -> Batches:
    """Of `--train.batch` crops, or of as few whole clips as devices and parts can share evenly."""
    train = config.train
    whole = batch_shards(mesh) * train.accumulate
    return clip_batches(config.data, crops=train.batch, whole=whole, workers=train.workers)


def train_vae(config: VAERun, *, stop_at: int | None = None) -> TrainState:
    """Render the clips if needed, then train (or go on with) a VAE in `config.out`, up to step `stop_at`.

    Raises UserError."""
    check_sizes(config)
    train = config.train
    mesh = train_mesh(config.mesh, samples=train.batch // train.accumulate)
    first_process_only(lambda: render_clips(config.data))

    def adjust(params: Params) -> Params:
        return gentle_start(params, config.model.latent_channels, jax.random.key(train.seed))

    weights = initial_weights(
        config.make, mesh, init=config.init, component="vae", seed=train.seed, adjust=adjust
    )
    optimizer = make_optimizer(
        weights.params,
        weight_decay=train.weight_decay,
        config=config.optim,
        still=ENCODER if config.loss.decoder_only else (),
    )
    step_fn = run_step(config, make_loss(compute_in(weights.merge, train.precision), config.loss), optimizer)
    state = create_state(weights.params, optimizer, train.seed, mesh=mesh)
    release(weights.params)
    batches = shared_batches(config, mesh)
    return fit_run(
        config,
        step_fn,
        state,
        weights.frozen,
        batches,
        mesh,
        sample=make_sampler(config, lambda state: weights.merge(state.average, weights.frozen)),
        stop_at=stop_at,
    )
