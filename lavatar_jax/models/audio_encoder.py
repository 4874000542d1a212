"""The causal audio encoder: speech features of 25 frames a second to tokens of each latent frame."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lavatar_jax.config import DiTConfig
from lavatar_jax.models.layers import EXACT, Linear, layer_norm, widen

# The strided convolutions look back 8 feature frames, so 5 copies of the first frame (one latent frame
# and one more, the fifth aligns the strides) give the numbers of the reference's 73 copies.
_PREFIX = 5


class AudioTokens(NamedTuple):
    """What the injectors attend to. P: speakers (actors).

    local: K = audio_tokens + 1 tokens a latent frame, the last is a learned padding token.
    global_: one vector a latent frame, which modulates the norm.
    """

    local: Float[Array, "B P F K D"]
    global_: Float[Array, "B P F D"]


class CausalConv1d(nnx.Module):
    """Convolution over time, kernel 3, that sees the past only; the first frame is repeated on the left."""

    def __init__(self, n_in: int, n_out: int, *, stride: int, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (3, n_in, n_out)) / math.sqrt(3 * n_in))
        self.bias = nnx.Param(jnp.zeros(n_out))
        self.stride = stride

    def __call__(self, x_BTC: Float[Array, "B T I"]) -> Float[Array, "B t O"]:
        weight = widen(self.weight[...])  # the whole encoder is a float32 island
        first = jnp.repeat(x_BTC[:, :1], 2, axis=1)
        x = jnp.concatenate([first, x_BTC], axis=1).astype(weight.dtype)
        y = jax.lax.conv_general_dilated(
            x,
            weight,
            (self.stride,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=EXACT,
        )
        return y + widen(self.bias[...])


def _norm_silu(x: Array) -> Array:
    return jax.nn.silu(layer_norm(x))


class CausalAudioEncoder(nnx.Module):
    """Weighted mix of the speech model's layers, then a local and a global branch, 4x down in time."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        width, tokens = config.width, config.audio_tokens
        self.layer_weights = nnx.Param(jnp.full(config.audio_layers, 0.01))
        self.local_in = CausalConv1d(config.audio_dim, tokens * width // 4, stride=1, rngs=rngs)
        self.global_in = CausalConv1d(config.audio_dim, width // 4, stride=1, rngs=rngs)
        self.conv2 = CausalConv1d(width // 4, width // 2, stride=2, rngs=rngs)
        self.conv3 = CausalConv1d(width // 2, width, stride=2, rngs=rngs)
        self.global_out = Linear(width, width, rngs=rngs, float32=True)
        self.padding_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.tokens = tokens

    def _down(self, x_BTC: Float[Array, "B T C"]) -> Float[Array, "B F D"]:
        x = _norm_silu(self.conv2(_norm_silu(x_BTC)))
        return _norm_silu(self.conv3(x))

    def __call__(self, features_BLAT: Float[Array, "B L A T"]) -> AudioTokens:
        """-> tokens of ceil(ceil(T / 2) / 2) latent frames, one speaker."""
        weights = jax.nn.silu(widen(self.layer_weights[...]))
        mixed = jnp.einsum("BLAT,L->BTA", features_BLAT, weights / weights.sum(), precision=EXACT)
        batch, time, _ = mixed.shape

        local = self.local_in(mixed).reshape(batch, time, self.tokens, -1)
        local = jnp.moveaxis(local, 2, 1).reshape(batch * self.tokens, time, -1)
        local = self._down(local)
        local = jnp.moveaxis(local.reshape(batch, self.tokens, *local.shape[1:]), 1, 2)
        padding = jnp.broadcast_to(self.padding_token[...], (*local.shape[:2], 1, local.shape[-1]))
        local = jnp.concatenate([local, padding.astype(local.dtype)], axis=2)

        global_ = self.global_out(self._down(self.global_in(mixed)))
        return AudioTokens(local[:, None], global_[:, None])


def encode_audio(
    encoder: CausalAudioEncoder, features_BPLAT: Float[Array, "B P L A T"], *, block_frames: int | None = None
) -> AudioTokens:
    """Speech features of P speakers for T = 4 F video frames -> tokens of F latent frames.

    What came before is unknown to the encoder: it sees copies of the first feature frame instead, in the
    reference's streaming loop for *every block anew*. `block_frames` (latent frames per block) does that
    to a longer stretch; None encodes the stretch as one, as the reference's training forward does.
    """
    batch, speakers, *feature_shape, time = features_BPLAT.shape
    if time % 4:
        raise ValueError(f"audio features must cover whole latent frames (4 video frames), got {time}")
    if block_frames is not None and time % (4 * block_frames):
        raise ValueError(f"{time // 4} latent frames are not a whole number of blocks of {block_frames}")
    pieces = 1 if block_frames is None else time // (4 * block_frames)
    x = features_BPLAT.reshape(batch * speakers, *feature_shape, pieces, time // pieces)
    x = jnp.moveaxis(x, -2, 1).reshape(-1, *feature_shape, time // pieces)
    x = jnp.concatenate([jnp.repeat(x[..., :1], _PREFIX, axis=-1), x], axis=-1)
    tokens = encoder(x)

    def restore(y: Array) -> Array:  # [B * P * pieces, 1, frames, ...] -> [B, P, F, ...]
        y = y[:, 0, _PREFIX // 4 + 1 :]
        return y.reshape(batch, speakers, time // 4, *y.shape[2:])

    return AudioTokens(*map(restore, tokens))
