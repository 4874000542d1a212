"""umT5: the text encoder whose states the transformer reads prompts from (reference behaviour 8).

A T5 encoder in which every layer has its own relative position bias. There are no biases in linear maps,
and no 1/sqrt(d) in the attention: training has put it into the weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lavatar_jax.models.layers import RMSNorm, gelu_tanh


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """Sizes of the encoder; the defaults are those of umT5-XXL (5.68 billion parameters)."""

    vocabulary: int = 256_384
    width: int = 4096
    attention_width: int = 4096  # of all heads together; need not be `width`
    ffn_width: int = 10_240
    layers: int = 24
    heads: int = 64
    buckets: int = 32  # of relative positions, half of them for keys after the query
    max_distance: int = 128  # tokens; all that are farther share the last bucket

    def __post_init__(self) -> None:
        if self.attention_width % self.heads:
            raise ValueError(f"attention_width {self.attention_width} must split into {self.heads} heads")
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError("buckets must be a multiple of 4, max_distance more than a quarter of it")


def position_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "T S"]:
    """The bucket of each query (row) and key (column) of `length` tokens.

    One half is for keys at or before the query, the other for keys after it. In each half, the first
    buckets are one distance each, the others grow in equal ratios up to `max_distance`.
    """
    positions = np.arange(length)
    offset = positions[None, :] - positions[:, None]
    half, exact = buckets // 2, buckets // 4
    growing = half - exact
    starts = exact * (max_distance / exact) ** (np.arange(growing) / growing)
    # Whole numbers among the starts (16, 32, ...) must not be missed by a rounding error.
    coarse = exact - 1 + np.searchsorted(starts - 1e-6, np.abs(offset), side="right")
    bucket = np.where(np.abs(offset) < exact, np.abs(offset), coarse)
    return (bucket + half * (offset > 0)).astype(np.int32)


def position_bias(table_KN: Float[Array, "K N"], max_distance: int, length: int) -> Float[Array, "N T S"]:
    """What is added to the attention logits, in float32, from a layer's table of K buckets for N heads."""
    bucket = position_buckets(length, len(table_KN), max_distance)
    return jnp.moveaxis(table_KN.astype(jnp.float32)[bucket], -1, 0)


def _matrix(n_in: int, n_out: int, rngs: nnx.Rngs, scale: float = 1.0) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (n_in, n_out)) * scale * n_in**-0.5)


class UMT5Attention(nnx.Module):
    """Self-attention with a position bias. Projections are [in, out]."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs) -> None:
        width, inner = config.width, config.attention_width
        self.q = _matrix(width, inner, rngs, (inner // config.heads) ** -0.5)
        self.k = _matrix(width, inner, rngs)
        self.v = _matrix(width, inner, rngs)
        self.o = _matrix(inner, width, rngs)
        self.position_bias = nnx.Param(jax.random.normal(rngs.params(), (config.buckets, config.heads)))
        self.heads, self.max_distance = config.heads, config.max_distance

    def __call__(self, x_BTD: Float[Array, "B T D"], mask_BT: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        batch, length, _ = x_BTD.shape
        q, k, v = (
            (x_BTD @ weight[...]).reshape(batch, length, self.heads, -1)
            for weight in (self.q, self.k, self.v)
        )
        bias = position_bias(self.position_bias[...], self.max_distance, length)
        # Logits and softmax are float32 in there, whatever q is.
        y = jax.nn.dot_product_attention(q, k, v, bias=bias[None], mask=mask_BT[:, None, None], scale=1.0)
        return y.reshape(batch, length, -1) @ self.o[...]


class UMT5FeedForward(nnx.Module):
    """Linear map times gate (a tanh-GELU), then a linear map back."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs) -> None:
        self.gate = _matrix(config.width, config.ffn_width, rngs)
        self.inner = _matrix(config.width, config.ffn_width, rngs)
        self.outer = _matrix(config.ffn_width, config.width, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = gelu_tanh((x @ self.gate[...]).astype(jnp.float32))  # bf16 would round its constants
        return (x @ self.inner[...] * gate.astype(x.dtype)) @ self.outer[...]


class UMT5Block(nnx.Module):
    """Attention and feed-forward, each on the normed states and added to them."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.width)
        self.attention = UMT5Attention(config, rngs=rngs)
        self.ffn_norm = RMSNorm(config.width)
        self.ffn = UMT5FeedForward(config, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"], mask_BT: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), mask_BT)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class UMT5Encoder(nnx.Module):
    """Token embedding, blocks stacked along a leading axis, final norm.

    Computes in the weights' dtype; norms, softmax, position bias and GELU are float32 in any case.
    """

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocabulary, config.width)))

        def block(key: Array) -> Any:
            return UMT5Block(config, rngs=nnx.Rngs(key))

        self.blocks = jax.vmap(block)(jax.random.split(rngs.params(), config.layers))
        self.norm = RMSNorm(config.width)

    def __call__(self, ids_BS: Int[Array, "B S"], mask_BS: Bool[Array, "B S"]) -> Float[Array, "B S E"]:
        """Token ids -> states [B, S, width]; tokens where the mask is False are seen by no other.

        Rows of padding hold numbers too, which mean nothing.
        """
        x = self.embedding[...][ids_BS]
        x, _ = jax.lax.scan(lambda x, block: (block(x, mask_BS), None), x, self.blocks)
        return self.norm(x)
