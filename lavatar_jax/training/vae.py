"""Stage 0: the VAE, on crops and whole pictures of short clips."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lavatar_jax.config import VAEConfig
from lavatar_jax.data.batches import Batch, Batches
from lavatar_jax.data.clips import ClipsConfig, clip_batches, random_crop, render_clips, unpack
from lavatar_jax.data.faces import random_training_frames
from lavatar_jax.data.pixels import PixelSource, pixel_batches
from lavatar_jax.data.records import file_name
from lavatar_jax.data.shards import DATASET, PREPARED
from lavatar_jax.data.skipped import SKIPPED
from lavatar_jax.errors import UserError
from lavatar_jax.inference.decode import decode
from lavatar_jax.inference.encode import encode
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.parallel import batch_shards, train_mesh
from lavatar_jax.training.distributed import first_process_only
from lavatar_jax.training.optim import make_optimizer
from lavatar_jax.training.precision import compute_in
from lavatar_jax.training.run import Run, fit_run, run_step
from lavatar_jax.training.samples import held_out_rows, make_evaluator, save_moving_pictures, to_host
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
    """`loss(params, frozen, batch, key)` of `run_step`, for batches of `clip_batches` and `pixel_batches`."""

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
    config: VAERun, model_of: Callable[[TrainState], CausalVAE], source: PixelSource | None = None
) -> Callable[[TrainState, Path], None] | None:
    """`sample` of `loop.fit`: pictures that the training never sees, left, and what the VAE keeps of them.

    They are the held-out records of `source`; None: faces of other clips than those of the training.
    """
    if not config.samples.records or not config.samples.every:
        return None
    pictures = functools.partial(_rendered_faces, config) if source is None else _held_out_videos(source)

    def sample(state: TrainState, folder: Path) -> None:
        vae = model_of(state)
        pairs = [
            (name, np.concatenate([video, to_host(decode(vae, encode(vae, video[None])))[0]], axis=2))
            for name, video in pictures()
        ]
        save_moving_pictures(pairs, folder)

    return sample


def _rendered_faces(config: VAERun) -> Iterator[tuple[str, Float[np.ndarray, "T H W 3"]]]:
    data = config.data
    key = jax.random.fold_in(jax.random.key(data.seed), data.clips)  # where no chunk of `render_clips` begins
    render = jax.jit(random_training_frames, static_argnums=(1, 2, 3))
    videos, _ = render(key, config.samples.records, data.frames, data.size)
    yield from ((f"face{index}", video) for index, video in enumerate(np.asarray(videos)))


def _held_out_videos(
    source: PixelSource,
) -> Callable[[], Iterator[tuple[str, Float[np.ndarray, "T H W 3"]]]]:
    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        for name, row in held_out_rows(source):
            yield file_name(name), row["video"].astype(np.float32) / 127.5 - 1.0

    return pictures


def held_out_crop(config: ClipsConfig, row: Batch, draw: int) -> Batch:
    """A crop of a held-out record to measure on: always the same one for the same `draw`."""
    size = (config.crop_size, config.crop_size)
    return random_crop(row, np.random.default_rng(draw), size=size, frames=config.crop_frames)


def open_pixels(config: VAERun) -> PixelSource | None:
    """The pictures of real videos in a run's folder; None where it is one for rendered clips.

    Raises UserError where there are none to be read.
    """
    folder = Path(config.data.folder)
    if any((folder / name).is_file() for name in (PREPARED, DATASET)):
        return PixelSource(folder, skipped_log=Path(config.out) / SKIPPED, held_out=config.samples.records)
    if config.data.clips:
        return None
    raise UserError(
        f"{folder} has no pictures of videos: prepare them with tools/prepare_data.py --pixels, or say by "
        "--data.clips how many clips to render"
    )


def check_sizes(config: VAERun, source: PixelSource | None = None) -> None:
    """Raises UserError for clips or crops that cannot be cut or encoded. `source`: where they are cut from;
    None: rendered clips."""
    data, latent = config.data, config.model.temporal_factor
    cell = math.lcm(config.model.spatial_factor, CELL)
    asked: dict[str, int] = {}
    if source is None:
        if data.clips < 0:
            raise UserError(f"--data.clips must be at least 0, not {data.clips}")
        asked = there = {"frames": data.frames, "size": data.size}
    else:
        there = {"frames": min(frames for frames, *_ in source.sizes), "size": min(source.sides)}
        if (data.full_share or source.held_out) and any(side % cell for side in source.sides):
            raise UserError(
                f"{source.folder} has pictures whose sides are no multiples of {cell} pixels: train on crops "
                "of them, and show none (--data.full-share 0 --samples.records 0)"
            )
    if data.full_share < 1 or (source is not None and source.held_out):  # else there are no crops
        asked = {**asked, "crop-frames": data.crop_frames, "crop-size": data.crop_size}
    for name, value in asked.items():
        if name.endswith("frames") and (value < 1 or (value - 1) % latent):
            raise UserError(f"--data.{name} must be 1 + {latent}k, not {value}: the VAE is causal")
        if name.endswith("size") and (value < 1 or value % cell):
            raise UserError(f"--data.{name} must be a multiple of {cell} pixels, not {value}")
        if value > (most := there[name.removeprefix("crop-")]):
            raise UserError(f"--data.{name} {value} is larger than the clips, which have {most}")


def shared_batches(config: VAERun, mesh: Mesh, source: PixelSource | None = None) -> Batches:
    """Of `--train.batch` crops, or of as few whole clips as devices and parts can share evenly.

    `source`: what they are cut from; None: rendered clips.
    """
    train = config.train
    whole = batch_shards(mesh) * train.accumulate
    if source is None:
        return clip_batches(config.data, crops=train.batch, whole=whole, workers=train.workers)
    return pixel_batches(source, config.data, crops=train.batch, whole=whole, workers=train.workers)


def train_vae(config: VAERun, *, stop_at: int | None = None) -> TrainState:
    """Render the clips if needed, then train (or go on with) a VAE in `config.out`, up to step `stop_at`.

    Raises UserError."""
    source = open_pixels(config)
    check_sizes(config, source)
    train = config.train
    mesh = train_mesh(config.mesh, samples=train.batch // train.accumulate)
    if source is None:
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
    loss_fn = make_loss(compute_in(weights.merge, train.precision), config.loss)
    step_fn = run_step(config, loss_fn, optimizer)
    state = create_state(weights.params, optimizer, train.seed, mesh=mesh)
    release(weights.params)
    batches = shared_batches(config, mesh, source)
    crop = functools.partial(held_out_crop, config.data)
    return fit_run(
        config,
        step_fn,
        state,
        weights.frozen,
        batches,
        mesh,
        evaluate=None if source is None else make_evaluator(source, loss_fn, weights.frozen, crop),
        sample=make_sampler(config, lambda state: weights.merge(state.average, weights.frozen), source),
        stop_at=stop_at,
    )
