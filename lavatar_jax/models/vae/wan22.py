"""Encoder and decoder bodies of the Wan 2.2 VAE: levels with a parameter-free shortcut around each.

The shortcut of a down level folds the pixels of a cell into channels and averages groups of them; that of
an up level duplicates channels and unfolds them into pixels. Channel orders follow the public checkpoints.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lavatar_jax.config import VAEConfig
from lavatar_jax.models.vae.blocks import Cache, Downsample, ResidualBlock, Upsample, Video, run_layers

# Published statistics of the Wan 2.2 latent space (48 channels).
WAN22_LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


def wan22_config() -> VAEConfig:
    """The published Wan 2.2 VAE: 16x in space, 4x in time, 48 channels."""
    return VAEConfig(
        kind="wan22",
        width=160,
        decoder_width=256,
        latent_channels=48,
        patch=2,
        latent_mean=WAN22_LATENT_MEAN,
        latent_std=WAN22_LATENT_STD,
    )


def average_down(x: Video, n_out: int, *, time: int, space: int) -> Float[Array, "B T2 H2 W2 O"]:
    """Cells of time x space x space pixels folded into channels, then averaged in groups to n_out channels.

    Frames are counted from the end: the first frame of a video fills its cell with zeros in front.
    Where there are fewer than n_out folded channels they are repeated.
    """
    batch, frames, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (-frames % time, 0), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, time, height // space, space, width // space, space, channels)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    folded = channels * time * space * space
    shape = x.shape[:4]
    if folded < n_out:
        return jnp.repeat(x.reshape(*shape, folded), n_out // folded, axis=-1)
    return x.reshape(*shape, n_out, folded // n_out).mean(axis=-1)


def duplicate_up(x: Video, n_out: int, *, time: int, space: int, first: bool) -> Float[Array, "B T2 H2 W2 O"]:
    """Channels duplicated, then unfolded into cells of time x space x space pixels of n_out channels.

    The first frame of a video keeps only the last frame of its cell.
    """
    batch, frames, height, width, channels = x.shape
    x = jnp.repeat(x, n_out * time * space * space // channels, axis=-1)
    x = x.reshape(batch, frames, height, width, n_out, time, space, space)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(batch, frames * time, height * space, width * space, n_out)
    return x[:, time - 1 :] if first else x


class DownLevel(nnx.Module):
    """Residual blocks, a down-sampler (none if `temporal` is None: coarsest level), averaging shortcut."""

    def __init__(self, n_in: int, n_out: int, blocks: int, *, temporal: bool | None, rngs: nnx.Rngs) -> None:
        widths = (n_in, *[n_out] * blocks)
        layers: list[nnx.Module] = [ResidualBlock(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        if temporal is not None:
            layers.append(Downsample(n_out, temporal=temporal, rngs=rngs))
        self.layers = nnx.List(layers)
        self.n_out = n_out
        self.time = 2 if temporal else 1
        self.space = 1 if temporal is None else 2

    def __call__(self, x: Video, cache: Cache, *, first: bool) -> tuple[Video, Cache]:
        y, cache = run_layers(self.layers, x, cache, first=first)
        return y + average_down(x, self.n_out, time=self.time, space=self.space), cache


class UpLevel(nnx.Module):
    """Residual blocks, an up-sampler and duplicating shortcut (none if `temporal` is None: finest level)."""

    def __init__(self, n_in: int, n_out: int, blocks: int, *, temporal: bool | None, rngs: nnx.Rngs) -> None:
        widths = (n_in, *[n_out] * blocks)
        layers: list[nnx.Module] = [ResidualBlock(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        if temporal is not None:
            layers.append(Upsample(n_out, n_out, temporal=temporal, rngs=rngs))
        self.layers = nnx.List(layers)
        self.n_out = n_out
        self.time = 2 if temporal else 1
        self.resamples = temporal is not None

    def __call__(self, x: Video, cache: Cache, *, first: bool) -> tuple[Video, Cache]:
        y, cache = run_layers(self.layers, x, cache, first=first)
        if self.resamples:
            y = y + duplicate_up(x, self.n_out, time=self.time, space=2, first=first)
        return y, cache


def encoder_layers(config: VAEConfig, *, rngs: nnx.Rngs) -> list[nnx.Module]:
    """One DownLevel per multiplier."""
    widths = [config.width * m for m in (1, *config.multipliers)]
    temporal = (*config.temporal_downsample, None)
    levels = zip(itertools.pairwise(widths), temporal, strict=True)
    return [DownLevel(a, b, config.res_blocks, temporal=t, rngs=rngs) for (a, b), t in levels]


def decoder_layers(config: VAEConfig, *, rngs: nnx.Rngs) -> list[nnx.Module]:
    """One UpLevel per multiplier, coarsest first, each with one residual block more than in the encoder."""
    coarse_to_fine = tuple(reversed(config.multipliers))
    widths = [(config.decoder_width or config.width) * m for m in (coarse_to_fine[0], *coarse_to_fine)]
    temporal = (*reversed(config.temporal_downsample), None)
    levels = zip(itertools.pairwise(widths), temporal, strict=True)
    return [UpLevel(a, b, config.res_blocks + 1, temporal=t, rngs=rngs) for (a, b), t in levels]
