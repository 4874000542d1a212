"""Encoder and decoder bodies of the Wan 2.1 VAE: flat lists of residual blocks and resamplers."""

from __future__ import annotations

from flax import nnx

from lavatar_jax.config import VAEConfig
from lavatar_jax.models.vae.blocks import Downsample, ResidualBlock, Upsample


def encoder_layers(config: VAEConfig, *, rngs: nnx.Rngs) -> list[nnx.Module]:
    """Pixels to the coarsest level; widths `config.width * multipliers`."""
    layers: list[nnx.Module] = []
    width = config.width
    for level, multiplier in enumerate(config.multipliers):
        for _ in range(config.res_blocks):
            layers.append(ResidualBlock(width, config.width * multiplier, rngs=rngs))
            width = config.width * multiplier
        if level < len(config.temporal_downsample):
            layers.append(Downsample(width, temporal=config.temporal_downsample[level], rngs=rngs))
    return layers


def decoder_layers(config: VAEConfig, *, rngs: nnx.Rngs) -> list[nnx.Module]:
    """The coarsest level back to pixels; up-sampling halves the width, the next block restores it."""
    layers: list[nnx.Module] = []
    decoder_width = config.decoder_width or config.width
    width = decoder_width * config.multipliers[-1]
    levels = zip(reversed(config.multipliers), [*reversed(config.temporal_downsample), None], strict=True)
    for multiplier, temporal in levels:
        for _ in range(config.res_blocks + 1):
            layers.append(ResidualBlock(width, decoder_width * multiplier, rngs=rngs))
            width = decoder_width * multiplier
        if temporal is not None:
            layers.append(Upsample(width, width // 2, temporal=temporal, rngs=rngs))
            width //= 2
    return layers
