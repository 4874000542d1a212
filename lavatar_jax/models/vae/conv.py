"""Convolutions of the video VAEs: causal in time with an explicit history, zero-padded in space.

A causal convolution sees the present frame and the frames before it. The frames it still needs
when the next chunk of video arrives are its history: an array that goes in and comes out, so a
video may be cut into chunks anywhere without changing a number.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from lavatar_jax.parallel import is_sharded

Implementation = Literal["auto", "taps", "plain"]

# How causal convolutions are computed where the caller does not say; read when a function is traced.
#   "plain": one 3-D convolution.
#   "taps":  the time taps concatenated into the channels of one 2-D convolution.
#   "auto":  "taps" on CPUs, "plain" elsewhere.
# XLA's CPU backend lowers 2-D convolutions to a fast contraction and 3-D ones to a slow loop. Forward and
# forward + backward (with XLA's own gradients) in ms on two AVX-512 cores, 3x3x3 taps:
#                           plain      taps      sum of 2-D convolutions   im2col + matmul
#   (6,5,32,32,48) -> 48    43 / 163   19 / 120  20 / 115                  93 / 140
#   (6,5,16,16,96) -> 96    25 /  94   13 /  50  18 /  81                  88 / 139
IMPLEMENTATION: Implementation = "auto"
AT_ONCE = (
    4096  # positions of small pictures in a matrix product of `kernel_gradient`; of large ones, a picture
)


def fan_in_normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    """Normal weights [..., in, out] that keep the variance of unit-variance inputs."""
    return jax.random.normal(rngs.params(), shape) / math.sqrt(math.prod(shape[:-1]))


def conv2d(
    x: Float[Array, "N H W I"],
    weight: Float[Array, "kh kw I O"],
    *,
    stride: int = 1,
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "N H2 W2 O"]:
    return lax.conv_general_dilated(
        x, weight, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _chosen(implementation: Implementation | None = None) -> Literal["taps", "plain"]:
    """What is computed for `implementation` (None: `IMPLEMENTATION`) on the default device."""
    implementation = implementation or IMPLEMENTATION
    if implementation == "auto":
        return "taps" if jax.default_backend() == "cpu" else "plain"
    return implementation


def time_conv3d(
    x: Float[Array, "B T H W I"],
    weight: Float[Array, "kt kh kw I O"],
    *,
    time_stride: int = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "B T2 H W O"]:
    """3-D convolution without padding in time ((T - kt) // time_stride + 1 outputs), zero-padded in space."""
    kt, kh, kw, n_in, n_out = weight.shape
    batch, frames, height, width, _ = x.shape
    if _chosen(implementation) == "plain":
        return lax.conv_general_dilated(
            x,
            weight,
            (time_stride, 1, 1),
            ((0, 0), *_same(weight[0])),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
    last = frames - kt + 1  # one past the first frame of the last window
    taps = jnp.concatenate([x[:, i : last + i : time_stride] for i in range(kt)], axis=-1)
    out_frames = taps.shape[1]
    images = taps.reshape(batch * out_frames, height, width, kt * n_in)
    kernel = jnp.moveaxis(weight, 0, 2).reshape(kh, kw, kt * n_in, n_out)
    # The fast gradient would bring the frames of all devices together.
    y = conv2d(images, kernel, padding=_same(kernel)) if is_sharded() else conv2d_same(images, kernel)
    return y.reshape(batch, out_frames, height, width, n_out)


@jax.custom_vjp
def conv2d_same(x: Float[Array, "N H W I"], weight: Float[Array, "kh kw I O"]) -> Float[Array, "N H W O"]:
    """`conv2d` by an odd kernel, zero-padded to the size of its input, with a gradient that is fast on CPUs.

    It has no forward-mode derivative.
    """
    return conv2d(x, weight, padding=_same(weight))


def _same(weight: Float[Array, "kh kw I O"]) -> tuple[tuple[int, int], tuple[int, int]]:
    kh, kw = weight.shape[:2]
    return (kh // 2, kh // 2), (kw // 2, kw // 2)


def _conv2d_same_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return conv2d_same(x, weight), (x, weight)


def _conv2d_same_backward(saved: tuple[Array, Array], error: Array) -> tuple[Array, Array]:
    x, weight = saved
    kh, kw = weight.shape[:2]
    mirrored = jnp.flip(weight, (0, 1)).swapaxes(2, 3)
    return conv2d(error, mirrored, padding=_same(weight)), kernel_gradient(x, error, (kh, kw))


conv2d_same.defvjp(_conv2d_same_forward, _conv2d_same_backward)


def kernel_gradient(
    x: Float[Array, "N H W I"], error: Float[Array, "N H W O"], kernel: tuple[int, int]
) -> Float[Array, "kh kw I O"]:
    """Gradient of `conv2d_same` with respect to its kernel, as matrix products of a few frames at a time.

    Every input position meets the errors that it has caused, of all taps side by side. XLA's own gradient is
    a convolution with a kernel as large as the picture. In ms on two AVX-512 cores:
                                           XLA's    this
        (25, 64, 64, 72) -> 24, 3x3          90       59
        (50, 32, 32, 72) -> 24               31       16
        (26, 16, 16, 144) -> 48              19        7
    """
    (frames, height, width, n_in), n_out = x.shape, error.shape[-1]
    kh, kw = kernel
    given = x.dtype
    group = max(1, min(frames, AT_ONCE // (height * width)))  # frames
    rest = -frames % group
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # many frames are summed up
    x = jnp.pad(x.astype(dtype), ((0, rest), (0, 0), (0, 0), (0, 0)))
    error = jnp.pad(error.astype(dtype), ((0, rest), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))

    def add(gradient: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        some, errors = pair
        of_taps = [
            errors[:, i : i + height, j : j + width] for i in reversed(range(kh)) for j in reversed(range(kw))
        ]
        errors = jnp.concatenate(of_taps, axis=-1)
        return gradient + some.reshape(-1, n_in).T @ errors.reshape(-1, kh * kw * n_out), None

    groups = (x.reshape(-1, group, *x.shape[1:]), error.reshape(-1, group, *error.shape[1:]))
    gradient, _ = lax.scan(add, jnp.zeros((n_in, kh * kw * n_out), dtype), groups)
    return gradient.reshape(n_in, kh, kw, n_out).transpose(1, 2, 0, 3).astype(given)


class CausalConv3d(nnx.Module):
    """Causal 3-D convolution, weight [kt, kh, kw, in, out].

    Its history is the last `kt - time_stride` input frames: two for the usual kernel of three, one for
    the temporal down-sampler of stride two. At the start of a video the history is zeros.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        *,
        time_stride: int = 1,
        rngs: nnx.Rngs,
    ) -> None:
        self.weight = nnx.Param(fan_in_normal(rngs, (*kernel, n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out))
        self.time_stride = time_stride
        self.history_frames = kernel[0] - time_stride

    def initial_history(self, x: Float[Array, "B T H W I"]) -> Float[Array, "B h H W I"]:
        return jnp.zeros((x.shape[0], self.history_frames, *x.shape[2:]), x.dtype)

    def __call__(
        self, x: Float[Array, "B T H W I"], history: Float[Array, "B h H W I"] | None = None
    ) -> tuple[Float[Array, "B T2 H W O"], Float[Array, "B h H W I"]]:
        """(output of T / time_stride frames, history for the next chunk); `history` None starts a video."""
        if history is None:
            history = self.initial_history(x)
        if x.shape[1] == 0:
            return jnp.zeros((*x.shape[:-1], self.bias.shape[0]), x.dtype), history
        x = jnp.concatenate([history, x], axis=1)
        y = time_conv3d(x, self.weight[...], time_stride=self.time_stride) + self.bias[...]
        return y, x[:, x.shape[1] - self.history_frames :]


class FrameConv2d(nnx.Module):
    """2-D convolution of every frame by itself, weight [kh, kw, in, out], no state in time."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 3, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(fan_in_normal(rngs, (kernel, kernel, n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out))

    def __call__(
        self,
        x: Float[Array, "B T H W I"],
        *,
        stride: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1)),
    ) -> Float[Array, "B T H2 W2 O"]:
        frames, weight = x.reshape(-1, *x.shape[2:]), self.weight[...]
        same = stride == 1 and padding == _same(weight) and all(side % 2 for side in weight.shape[:2])
        if same and _chosen() == "taps" and not is_sharded():
            y = conv2d_same(frames, weight)
        else:
            y = conv2d(frames, weight, stride=stride, padding=padding)
        return y.reshape(*x.shape[:2], *y.shape[1:]) + self.bias[...]
