"""How a PyTorch tensor is laid out in our parameters, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
    """`forward`: PyTorch layout to ours. `inverse`: the way back, None where the shape is forgotten."""

    forward: Function
    inverse: Function | None = None


def permute(*axes: int) -> Transform:
    """Ours is PyTorch's tensor with its axes in this order."""
    inverse_axes = tuple(np.argsort(axes))
    return Transform(lambda x: x.transpose(axes), lambda x: x.transpose(inverse_axes))


def flatten_from(*shape: int) -> Transform:
    """PyTorch's tensor has this shape (one -1 at most), ours is flat."""

    def forward(x: np.ndarray) -> np.ndarray:
        fits = [want in (-1, got) for want, got in zip(shape, x.shape, strict=False)]
        if x.ndim != len(shape) or not all(fits):
            raise ValueError(f"shape {list(x.shape)} is not of the form {list(shape)}")
        return x.reshape(-1)

    return Transform(forward, lambda x: x.reshape(shape))


def pointwise(space: int) -> Transform:
    """[out, in, 1, ...] of a convolution without extent to the linear weight [in, out]."""

    def forward(x: np.ndarray) -> np.ndarray:
        if x.shape[2:] != (1,) * space:
            raise ValueError(f"shape {list(x.shape)} is not that of a 1x1 convolution")
        return x.reshape(x.shape[:2]).T

    return Transform(forward, lambda x: x.T.reshape(*x.T.shape, *(1,) * space))


def _drop_first(x: np.ndarray) -> np.ndarray:
    if x.shape[0] != 1:
        raise ValueError(f"shape {list(x.shape)} does not start with 1")
    return x[0]


TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(lambda x: x, lambda x: x),
    "linear": permute(1, 0),  # [out, in] -> [in, out]
    "conv1d": permute(2, 1, 0),  # [out, in, k] -> [k, in, out]
    "conv2d": permute(2, 3, 1, 0),  # [out, in, kh, kw] -> [kh, kw, in, out]
    "conv3d": permute(2, 3, 4, 1, 0),  # [out, in, kt, kh, kw] -> [kt, kh, kw, in, out]
    "pointwise2d": pointwise(2),  # [out, in, 1, 1] -> [in, out]
    "pointwise3d": pointwise(3),  # [out, in, 1, 1, 1] -> [in, out]
    "channels2d": flatten_from(-1, 1, 1),  # [C, 1, 1] -> [C]
    "channels3d": flatten_from(-1, 1, 1, 1),  # [C, 1, 1, 1] -> [C]
    "drop_first": Transform(_drop_first, lambda x: x[None]),  # [1, ...] -> [...]
}
