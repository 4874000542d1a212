"""Layers shared by the networks: linear maps, norms, patch embedding, per-frame modulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def widen(x: Array) -> Array:
    """At least float32, the precision of what bfloat16 is too coarse for; float64 stays, for exact checks."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# Of products in float32 islands: the default of some accelerators rounds operands to TF32 or bfloat16.
EXACT = jax.lax.Precision.HIGHEST


class Linear(nnx.Module):
    """`x @ weight + bias`, weight [in, out]; computes in the weight's dtype, or at least float32 if asked to.

    `float32` also asks for products that are not rounded to TF32 or bfloat16, whatever the device's default.

    In place of the array, `weight` may hold a `quant.QuantizedWeight`, a `lora.AdaptedWeight` or, in
    training, a `precision.RoundedWeight`; the result then has the bias's dtype.
    """

    def __init__(
        self, n_in: int, n_out: int, *, rngs: nnx.Rngs, zero: bool = False, float32: bool = False
    ) -> None:
        scale = 0.0 if zero else 1.0 / math.sqrt(n_in)
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out))
        self.float32 = float32

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        weight, bias = self.weight.get_value(), self.bias[...]
        if not isinstance(weight, jax.Array):
            return (x.astype(bias.dtype) @ weight + bias).astype(bias.dtype)
        if not self.float32:
            return x.astype(weight.dtype) @ weight + bias.astype(weight.dtype)
        weight, bias = widen(weight), widen(bias)
        return jnp.matmul(x.astype(weight.dtype), weight, precision=EXACT) + bias


class RMSNorm(nnx.Module):
    """RMS norm over the last axis with a weight, statistics in float32.

    Used for queries and keys over *all* channels, before they are split into heads.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        self.weight = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = widen(x)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * self.weight[...]


def layer_norm(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """Layer norm without affine parameters, computed and returned in (at least) float32."""
    x = widen(x)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps)


class LayerNorm(nnx.Module):
    """Affine layer norm, computed in float32, returned in the input's dtype."""

    def __init__(self, width: int) -> None:
        self.weight = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return (layer_norm(x) * self.weight[...] + self.bias[...]).astype(x.dtype)


class MLP(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_out: int,
        activation: Callable[[Array], Array],
        *,
        rngs: nnx.Rngs,
        float32: bool = False,
    ) -> None:
        self.inner = Linear(n_in, n_hidden, rngs=rngs, float32=float32)
        self.outer = Linear(n_hidden, n_out, rngs=rngs, float32=float32)
        self.activation = activation

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return self.outer(self.activation(self.inner(x)))


def gelu_tanh(x: Array) -> Array:
    """Computed in float32 as PyTorch does: in bfloat16 already the constants would be off by 0.1 %."""
    return jax.nn.gelu(widen(x), approximate=True).astype(x.dtype)


class PatchEmbed(nnx.Module):
    """A 3-D convolution whose stride is its kernel, as one matrix product.

    Rows, columns and frames that do not fill a patch are cut off at the end, as the convolution does.
    """

    def __init__(self, kernel: tuple[int, int, int], n_in: int, n_out: int, *, rngs: nnx.Rngs, zero=False):
        scale = 0.0 if zero else 1.0 / math.sqrt(math.prod(kernel) * n_in)
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (*kernel, n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out))

    def __call__(self, x_BFHWC: Float[Array, "B F H W C"]) -> Float[Array, "B T D"]:
        """-> tokens in the order frame, row, column."""
        weight = self.weight[...]
        pf, ph, pw, n_in, n_out = weight.shape
        f, h, w = (n // p for n, p in zip(x_BFHWC.shape[1:4], (pf, ph, pw), strict=True))
        x = x_BFHWC[:, : f * pf, : h * ph, : w * pw].astype(weight.dtype)
        x = x.reshape(-1, f, pf, h, ph, w, pw, n_in).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        x = x.reshape(x.shape[0], f * h * w, pf * ph * pw * n_in)
        return x @ weight.reshape(-1, n_out) + self.bias[...]


def spread(rows_BRD: Float[Array, "B R D"], frames: int, tokens_per_frame: int, cond: int) -> Array:
    """Give every token the row of its frame: [B, R, D] -> [B, frames * tokens_per_frame + cond, D].

    The last row belongs to the `cond` (reference and motion) tokens when there are any. A broadcast
    that XLA fuses into its consumer: no per-token modulation tensor is ever stored.
    """
    batch, _, width = rows_BRD.shape
    noisy = jnp.broadcast_to(rows_BRD[:, :frames, None], (batch, frames, tokens_per_frame, width))
    noisy = noisy.reshape(batch, frames * tokens_per_frame, width)
    if not cond:
        return noisy
    return jnp.concatenate([noisy, jnp.broadcast_to(rows_BRD[:, -1:], (batch, cond, width))], axis=1)
