"""The causal video VAE: encoder, decoder, latent statistics, whole clips and streams."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lavatar_jax.config import VAEConfig
from lavatar_jax.errors import UserError
from lavatar_jax.models.layers import Linear
from lavatar_jax.models.vae import wan21, wan22
from lavatar_jax.models.vae.blocks import Cache, FrameAttention, NormConv, ResidualBlock, Video, run_layers
from lavatar_jax.models.vae.conv import CausalConv3d

Latent = Float[Array, "B F h w Z"]


class VideoVAE(Protocol):
    """What the rest of the project asks of a VAE. Video is [B, T, H, W, 3] in [-1, 1]."""

    config: VAEConfig

    def encode(self, video: Video) -> Latent: ...
    def decode(self, latent: Latent) -> Video: ...
    def init_encode_cache(self, batch: int, height: int, width: int) -> Cache: ...
    def stream_encode(self, video: Video, cache: Cache, *, first: bool) -> tuple[Latent, Cache]: ...
    def init_decode_cache(self, batch: int, latent_height: int, latent_width: int) -> Cache: ...
    def stream_decode(self, latent: Latent, cache: Cache, *, first: bool) -> tuple[Video, Cache]: ...


class Coder(nnx.Module):
    """Encoder or decoder: causal convolution, a list of layers, norm and causal convolution.

    The middle (residual, attention, residual) is on the coarse side: last in an encoder, first in a decoder.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        layers: list[nnx.Module],
        *,
        widths: tuple[int, int],
        middle_first: bool,
        rngs: nnx.Rngs,
    ) -> None:
        first_width, last_width = widths
        middle_width = first_width if middle_first else last_width
        self.conv_in = CausalConv3d(n_in, first_width, rngs=rngs)
        self.layers = nnx.List(layers)
        self.middle = nnx.List(
            [
                ResidualBlock(middle_width, middle_width, rngs=rngs),
                FrameAttention(middle_width, rngs=rngs),
                ResidualBlock(middle_width, middle_width, rngs=rngs),
            ]
        )
        self.head = NormConv(last_width, n_out, rngs=rngs)
        self.middle_first = middle_first

    def __call__(self, x: Video, cache: Cache, *, first: bool) -> tuple[Video, Cache]:
        cache_in, *cache_layers = cache or (None, None)
        x, cache_in = self.conv_in(x, cache_in)
        body = (*self.middle, *self.layers) if self.middle_first else (*self.layers, *self.middle)
        x, cache_body = run_layers((*body, self.head), x, cache_layers[0], first=first)
        return x, (cache_in, cache_body)


class CausalVAE(nnx.Module):
    """A causal video VAE (the Wan 2.1 or 2.2 architecture): 1 + r k frames <-> 1 + k latents.

    r is `config.temporal_factor`. Nothing looks ahead, so a whole clip is just a long first chunk of a stream
    (`stream_*`); cut anywhere, it gives the same numbers up to rounding. Video is [B, T, H, W, 3] in [-1, 1];
    latents are normalised by `config.latent_mean` and `config.latent_std`. Computes in the parameters' dtype.
    The reference encodes chunks of 1, 4, 4, ... frames and decodes one latent at a time.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs) -> None:
        """Raises UserError when the latent statistics do not have `config.latent_channels` entries."""
        for name in ("latent_mean", "latent_std"):
            if len(getattr(config, name)) != config.latent_channels:
                raise UserError(
                    f"VAEConfig.{name} has {len(getattr(config, name))} entries for {config.latent_channels} "
                    f"latent channels: give one per channel, e.g. (0.0,) * n and (1.0,) * n before training"
                )
        if len(config.temporal_downsample) != len(config.multipliers) - 1:
            raise UserError("VAEConfig.temporal_downsample needs one entry per level but the last")
        architecture = {"wan21": wan21, "wan22": wan22}[config.kind]
        pixel_channels = 3 * config.patch**2
        z = config.latent_channels
        fine, coarse = config.multipliers[0], config.multipliers[-1]
        decoder_width = config.decoder_width or config.width
        self.encoder = Coder(
            pixel_channels,
            2 * z,
            architecture.encoder_layers(config, rngs=rngs),
            widths=(config.width, config.width * coarse),
            middle_first=False,
            rngs=rngs,
        )
        self.quant = Linear(2 * z, 2 * z, rngs=rngs)
        self.post_quant = Linear(z, z, rngs=rngs)
        self.decoder = Coder(
            z,
            pixel_channels,
            architecture.decoder_layers(config, rngs=rngs),
            widths=(decoder_width * coarse, decoder_width * fine),
            middle_first=True,
            rngs=rngs,
        )
        self.config = config

    # Whole clips

    def encode(self, video: Video) -> Latent:
        """Normalised mean of the latents: T = 1 + r k frames to 1 + k latents."""
        return self.stream_encode(video, None, first=True)[0]

    def encode_distribution(self, video: Video) -> tuple[Latent, Latent]:
        """(mean, log variance) of the latents, not normalised; for training."""
        mean, logvar, _ = self.stream_encode_distribution(video, None, first=True)
        return mean, logvar

    def decode(self, latent: Latent) -> Video:
        """1 + k normalised latents to 1 + r k frames, not clamped (`to_pixels` clamps)."""
        return self.stream_decode(latent, None, first=True)[0]

    # Streams

    def init_encode_cache(self, batch: int, height: int, width: int) -> Cache:
        """Cache before the first frame of videos of this size; its shapes never change."""
        video = jnp.zeros((batch, 1, height, width, 3), self.dtype)
        return _zeros_like_result(lambda x: self.stream_encode_distribution(x, None, first=True)[2], video)

    def stream_encode(self, video: Video, cache: Cache, *, first: bool) -> tuple[Latent, Cache]:
        """Encode the next chunk: 1 + r k frames if it is the `first`, else r k frames (k latents)."""
        mean, _, cache = self.stream_encode_distribution(video, cache, first=first)
        return self.normalise(mean), cache

    def stream_encode_distribution(
        self, video: Video, cache: Cache, *, first: bool
    ) -> tuple[Latent, Latent, Cache]:
        """(mean, log variance, cache) of the next chunk, not normalised."""
        _check_video(video, self.config, first=first)
        x, cache = self.encoder(patchify(video.astype(self.dtype), self.config.patch), cache, first=first)
        mean, logvar = jnp.split(self.quant(x), 2, axis=-1)
        return mean, logvar, cache

    def init_decode_cache(self, batch: int, latent_height: int, latent_width: int) -> Cache:
        """Cache before the first latent of videos of this latent size; its shapes never change."""
        latent = jnp.zeros((batch, 1, latent_height, latent_width, self.config.latent_channels), self.dtype)
        return _zeros_like_result(lambda z: self.stream_decode(z, None, first=True)[1], latent)

    def stream_decode(self, latent: Latent, cache: Cache, *, first: bool) -> tuple[Video, Cache]:
        """Decode the next k latents: 1 + r (k - 1) frames if they are the `first`, else r k frames."""
        x = self.post_quant(self.denormalise(latent.astype(self.dtype)))
        x, cache = self.decoder(x, cache, first=first)
        return unpatchify(x, self.config.patch), cache

    # Latent statistics

    def normalise(self, raw: Latent) -> Latent:
        """Raw encoder means to the latent space that diffusion works in."""
        mean, std = self._statistics(raw.dtype)
        return (raw - mean) / std

    def denormalise(self, latent: Latent) -> Latent:
        mean, std = self._statistics(latent.dtype)
        return latent * std + mean

    @property
    def dtype(self) -> jnp.dtype:
        return self.post_quant.weight[...].dtype

    def _statistics(self, dtype: jnp.dtype) -> tuple[Array, Array]:
        return jnp.asarray(self.config.latent_mean, dtype), jnp.asarray(self.config.latent_std, dtype)


def make_vae(config: VAEConfig, *, rngs: nnx.Rngs) -> CausalVAE:
    """A VAE with fresh weights. Raises UserError for an inconsistent configuration."""
    return CausalVAE(config, rngs=rngs)


def to_pixels(video: Video) -> Video:
    """Decoder output clamped to the pixel range [-1, 1]."""
    return jnp.clip(video, -1.0, 1.0)


def patchify(video: Video, patch: int) -> Video:
    """Fold patch x patch pixels into channels ordered (colour, column, row)."""
    batch, frames, height, width, colours = video.shape
    x = video.reshape(batch, frames, height // patch, patch, width // patch, patch, colours)
    x = x.transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(batch, frames, height // patch, width // patch, colours * patch * patch)


def unpatchify(x: Video, patch: int) -> Video:
    """The inverse of `patchify`."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height, width, channels // patch**2, patch, patch)
    x = x.transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(batch, frames, height * patch, width * patch, channels // patch**2)


def _zeros_like_result(function, argument: Array) -> Cache:
    shapes = jax.eval_shape(function, argument)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _check_video(video: Video, config: VAEConfig, *, first: bool) -> None:
    frames, height, width = video.shape[1:4]
    space, time = config.spatial_factor, config.temporal_factor
    if height % space or width % space:
        raise UserError(
            f"a video of {height}x{width} pixels does not divide by {space}, the VAE's factor: resize"
        )
    if frames == 0 or (frames - first) % time:
        expected = f"1 + {time}k" if first else f"{time}k"
        raise UserError(f"the VAE takes chunks of {expected} frames here, got {frames}: trim or pad the clip")
