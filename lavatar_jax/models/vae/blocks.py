"""Building blocks of the Wan video VAEs.

Every block is called as `block(x, cache, first=...) -> (y, cache)`. The cache is a pytree of the frames
its convolutions still need (a tuple, in the order in which they are met); None starts a video.
`first` says that x begins with the video's first frame, which the temporal resamplers treat on its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lavatar_jax.models.layers import Linear
from lavatar_jax.models.vae.conv import CausalConv3d, FrameConv2d

Cache = Any  # nested tuples of arrays [B, frames, H, W, C], or None at the start of a video
Video = Float[Array, "B T H W C"]


def run_layers(layers: Iterable[Any], x: Video, cache: Cache, *, first: bool) -> tuple[Video, Cache]:
    """Run blocks one after the other, each with its own part of the cache."""
    layers = list(layers)
    new_caches = []
    for layer, layer_cache in zip(layers, cache or (None,) * len(layers), strict=True):
        x, layer_cache = layer(x, layer_cache, first=first)
        new_caches.append(layer_cache)
    return x, tuple(new_caches)


class ChannelRMSNorm(nnx.Module):
    """x / |x| * sqrt(C) * gamma over the channels, statistics in float32.

    The floor on the mean square matters only where all channels are all but zero; it is higher than the
    reference's, which lets gradients overflow there.
    """

    def __init__(self, width: int) -> None:
        self.gamma = nnx.Param(jnp.ones(width))

    def __call__(self, x: Video) -> Video:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(jnp.maximum(mean_square, 1e-8))).astype(x.dtype) * self.gamma[...]


class NormConv(nnx.Module):
    """RMS norm, SiLU, causal 3x3x3 convolution."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs) -> None:
        self.norm = ChannelRMSNorm(n_in)
        self.conv = CausalConv3d(n_in, n_out, rngs=rngs)

    def __call__(self, x: Video, cache: Cache, *, first: bool) -> tuple[Video, Cache]:
        return self.conv(jax.nn.silu(self.norm(x)), cache)


class ResidualBlock(nnx.Module):
    """Two norm-SiLU-convolution stages and a shortcut, which is linear where the width changes."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs) -> None:
        self.inner = NormConv(n_in, n_out, rngs=rngs)
        self.outer = NormConv(n_out, n_out, rngs=rngs)
        self.shortcut = Linear(n_in, n_out, rngs=rngs) if n_in != n_out else None

    def __call__(self, x: Video, cache: Cache, *, first: bool) -> tuple[Video, Cache]:
        y, cache = run_layers((self.inner, self.outer), x, cache, first=first)
        return y + (x if self.shortcut is None else self.shortcut(x)), cache


class FrameAttention(nnx.Module):
    """Single-head self-attention among the positions of each frame; starts as the identity."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm = ChannelRMSNorm(width)
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs, zero=True)

    def __call__(self, x: Video, cache: Cache, *, first: bool) -> tuple[Video, Cache]:
        batch, frames, height, width, channels = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch * frames, height * width, 1, 3 * channels)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        y = jax.nn.dot_product_attention(q, k, v)
        return x + self.out(y.reshape(x.shape)), ()


class Downsample(nnx.Module):
    """Halve height and width, and with `temporal` the frame rate: 1 + 2k frames become 1 + k.

    The first frame of a video passes without the temporal convolution; it is the history of the next.
    """

    def __init__(self, width: int, *, temporal: bool, rngs: nnx.Rngs) -> None:
        self.conv = FrameConv2d(width, width, rngs=rngs)
        self.time_conv = CausalConv3d(width, width, (3, 1, 1), time_stride=2, rngs=rngs) if temporal else None

    def __call__(self, x: Video, cache: Cache, *, first: bool) -> tuple[Video, Cache]:
        x = self.conv(x, stride=2, padding=((0, 1), (0, 1)))
        if self.time_conv is None:
            return x, ()
        if not first:
            return self.time_conv(x, cache)
        head, tail = x[:, :1], x[:, 1:]
        tail, cache = self.time_conv(tail, head)
        return jnp.concatenate([head, tail], axis=1), cache


class Upsample(nnx.Module):
    """Double height and width, and with `temporal` the frame rate: 1 + k frames become 1 + 2k.

    The first frame of a video passes without the temporal convolution, and the second one sees no
    history (the reference's 'Rep' mark in its cache), not even the first frame.
    """

    def __init__(self, width: int, n_out: int, *, temporal: bool, rngs: nnx.Rngs) -> None:
        self.conv = FrameConv2d(width, n_out, rngs=rngs)
        self.time_conv = CausalConv3d(width, 2 * width, (3, 1, 1), rngs=rngs) if temporal else None

    def __call__(self, x: Video, cache: Cache, *, first: bool) -> tuple[Video, Cache]:
        cache = () if self.time_conv is None else cache
        if self.time_conv is not None:
            head, tail = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
            pairs, cache = self.time_conv(tail, None if first else cache)
            x = jnp.concatenate([head, _interleave_pairs(pairs)], axis=1)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.conv(x), cache


def _interleave_pairs(x: Float[Array, "B T H W C2"]) -> Video:
    """[frame 2t | frame 2t+1] in the channels to frames in a row."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height, width, 2, channels // 2)
    return jnp.moveaxis(x, 4, 2).reshape(batch, 2 * frames, height, width, channels // 2)
