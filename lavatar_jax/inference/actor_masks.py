"""Which actor's voice drives which part of the picture: from one black-and-white image per actor.

Follows the reference's mask building (reference behaviour 3.5): an actor's voice is muted only where
*another* actor is, so the background hears everybody and the overlap of two (dilated) actors nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lavatar_jax.errors import UserError
from lavatar_jax.inference.images import load_image

DILATION = 0.1  # of the longer side of the actor's box


def load_actor_masks(paths: Sequence[str | Path]) -> np.ndarray:
    """One image per actor, bright where the actor is: bool [P, 1, H, W].

    Raises UserError for unreadable images and for images of different sizes.
    """
    masks = [load_image(path).mean(axis=-1) > 127 for path in paths]
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise UserError(
                f"{path}: actor masks must have one size; this one is {mask.shape[1]}x{mask.shape[0]}, "
                f"{paths[0]} is {masks[0].shape[1]}x{masks[0].shape[0]}"
            )
    return np.stack(masks)[:, None]


def build_actor_masks(masks: np.ndarray, tokens_FHW: tuple[int, int, int]) -> np.ndarray:
    """Weights of every actor's audio residual: float32 [P, F, H, W], in tokens of the latent video.

    `masks` [P, frames, h, w] is non-zero where the actor is; later actors overwrite earlier ones.
    """
    dilated = dilate(route(masks, tokens_FHW))
    others = dilated.sum(axis=0, keepdims=True) - dilated
    return (others == 0).astype(np.float32)


def route(masks: np.ndarray, tokens_FHW: tuple[int, int, int]) -> np.ndarray:
    """The one actor (or none) that each token belongs to, one-hot: bool [P, F, H, W]."""
    present = (np.asarray(masks) > 0).astype(np.float32)
    for axis, size in zip((1, 2, 3), tokens_FHW, strict=True):
        present = _resize_linear(present, axis, size)
    belongs = present > 0.5
    # Counted from the last actor backwards: a token is this actor's if no later one claims it too.
    claims: np.ndarray = np.cumsum(belongs[::-1], axis=0)[::-1]
    return belongs & (claims == 1)


def dilate(regions: np.ndarray, ratio: float = DILATION) -> np.ndarray:
    """Grows the region of each actor in each frame by a square, in proportion to its bounding box.

    [P, F, H, W] bool -> the same. The square reaches `ratio` of the box's longer side, at least one token.
    """
    grown = regions.copy()
    for index in np.ndindex(regions.shape[:2]):
        rows, columns = np.nonzero(regions[index])
        if rows.size:
            box = max(np.ptp(rows), np.ptp(columns)) + 1
            grown[index] = _grow(regions[index], max(1, int(np.ceil(ratio * box - 1e-4))))
    return grown


def _grow(region: np.ndarray, radius: int) -> np.ndarray:
    """Marks every place within `radius` rows and columns of a marked one."""
    for axis in (0, 1):
        padding = [(radius, radius) if a == axis else (0, 0) for a in (0, 1)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(region, padding), 2 * radius + 1, axis)
        region = np.any(windows, axis=-1)
    return region


def _resize_linear(values: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear interpolation between pixel centres, without antialiasing, edges repeated."""
    length = values.shape[axis]
    source = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    low = np.floor(source).astype(int)
    high = np.minimum(low + 1, length - 1)
    weight = (source - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    return np.take(values, low, axis) * (1 - weight) + np.take(values, high, axis) * weight
