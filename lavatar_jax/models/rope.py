"""Rotary position embedding over (frame, height, width), with angles from the host in float64.

The reference looks positions up in a table of 45,000 rows in complex half precision, so it fails after
two hours of video. Here the host computes the angles of one block from the absolute frame index, a
Python int, and hands over a few kilobytes of float32 cosines and sines: exact for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lavatar_jax.models.layers import widen

THETA = 10_000.0
REFERENCE_FRAME = 30  # where the reference image sits in time until it starts to roll


class Rope(NamedTuple):
    """Cosine and sine for each token: [T, head_dim / 2], the same for all heads.

    With a leading axis [B, T, head_dim / 2] every row of a batch has its own positions.
    """

    cos: Float[Array | np.ndarray, "*B T half"]
    sin: Float[Array | np.ndarray, "*B T half"]


class Grid(NamedTuple):
    """A box of tokens: `end - start` tokens a side are laid over `target` positions from `start` on.

    Fewer tokens than positions means that the tokens are coarse (packed motion frames). A negative
    frame start means truly negative positions, as motion frames before the video have.
    """

    start: tuple[int, int, int]
    end: tuple[int, int, int]
    target: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        f, h, w = (end - start for start, end in zip(self.start, self.end, strict=True))
        return f, h, w

    def rolled(self, frames: int) -> Grid:
        """The grid moved `frames` later in time."""
        (f0, h0, w0), (f1, h1, w1) = self.start, self.end
        return Grid((f0 + frames, h0, w0), (f1 + frames, h1, w1), self.target)


def video_grid(frame: int, frames: int, rows: int, columns: int) -> Grid:
    """Tokens of `frames` latent frames that begin at absolute latent frame `frame`."""
    return Grid((frame, 0, 0), (frame + frames, rows, columns), (frames, rows, columns))


def motion_grids(height: int, width: int, patch: int = 2, roll: int = 0) -> list[Grid]:
    """Grids of the packed motion tokens (newest frame; the 2 before, 2x; the 16 before, 4x).

    `height`, `width`: latent size. `roll` moves the first two groups only, as the reference does.
    """
    rows, columns = height // patch, width // patch
    near = Grid((-1, 0, 0), (0, rows, columns), (1, rows, columns))
    middle = Grid((-3, 0, 0), (-2, height // (2 * patch), width // (2 * patch)), (2, rows, columns))
    far = Grid((-19, 0, 0), (-15, height // (4 * patch), width // (4 * patch)), (16, rows, columns))
    return [near.rolled(roll), middle.rolled(roll), far]


def sink_grids(height: int, width: int, patch: int = 2, roll: int = 0, motion: bool = True) -> list[Grid]:
    """Grids of the sink: the reference frame, rolled by `roll`, and motion tokens, which never move."""
    reference = video_grid(REFERENCE_FRAME + roll, 1, height // patch, width // patch)
    return [reference, *(motion_grids(height, width, patch) if motion else [])]


def sink_roll(frame: int, distance: int) -> int:
    """How far the reference has rolled when the block starts at latent frame `frame` (paper, Rolling RoPE).

    The reference stays at frame 30 until the video comes within `distance` frames, then keeps that
    distance ahead of the block.
    """
    return max(0, frame - (REFERENCE_FRAME - distance))


def _positions(start: int, count: int, target: int, mirrored: bool) -> np.ndarray:
    """`count` integer positions spread over `target` ones from `start` on (truncated linspace)."""
    # Integer arithmetic, so that no rounding decides whether a position is 13 or 12.
    offsets = np.arange(count, dtype=np.int64) * (target - 1) // max(count - 1, 1)
    return -(abs(start) - offsets) if mirrored else start + offsets


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that rotate with frame, row and column."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def angles(
    grids: list[Grid], head_dim: int, function: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> Float[np.ndarray, "T half"]:
    """Rotation angles of all tokens of the grids, in order, float64; or an elementwise function of them.

    The function sees the angles of each axis, a few hundred numbers, before they are laid over the grid.
    """
    parts = []
    for grid in grids:
        axes = []
        for axis, dim in enumerate(axis_dims(head_dim)):
            mirrored = axis == 0 and grid.start[0] < 0
            position = _positions(grid.start[axis], grid.shape[axis], grid.target[axis], mirrored)
            frequency = THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
            shape = [1, 1, 1, dim // 2]
            shape[axis] = len(position)
            angle = function((position[:, None] * frequency).reshape(shape))
            axes.append(np.broadcast_to(angle, (*grid.shape, dim // 2)))
        parts.append(np.concatenate(axes, axis=-1).reshape(-1, head_dim // 2))
    return np.concatenate(parts)


def rope(grids: list[Grid], head_dim: int, *, half_table: bool = False) -> Rope:
    """Cosines and sines of all tokens of the grids, float32, not to be written to.

    `half_table=True` rounds them to float16 first, which reproduces the released PyTorch code
    (about 1e-4 on the model's output).
    """
    tables = [_grid_rope(grid, head_dim, half_table) for grid in grids]
    return tables[0] if len(tables) == 1 else concatenate(*tables)


@functools.lru_cache(maxsize=32)  # motion grids never move, and all steps of a block may share a distance
def _grid_rope(grid: Grid, head_dim: int, half_table: bool) -> Rope:
    def rounded(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float32)
        # The reference casts a complex128 table through float32.
        return x.astype(np.float16).astype(np.float32) if half_table else x

    cos = angles([grid], head_dim, lambda angle: rounded(np.cos(angle)))
    sin = angles([grid], head_dim, lambda angle: rounded(np.sin(angle)))
    cos.flags.writeable = sin.flags.writeable = False
    return Rope(cos, sin)


def zero_rope(tokens: int, head_dim: int) -> Rope:
    """A "rotation" by zero, which erases queries and keys: the reference's dropped motion tokens."""
    zeros = np.zeros((tokens, head_dim // 2), np.float32)
    return Rope(zeros, zeros)


def concatenate(*ropes: Rope) -> Rope:
    return Rope(np.concatenate([r.cos for r in ropes]), np.concatenate([r.sin for r in ropes]))


def apply_rope(x_BTNH: Float[Array, "B T N H"], table: Rope) -> Float[Array, "B T N H"]:
    """Rotate the channel pairs (2i, 2i+1) of every head; computed in (at least) float32."""
    # Sizes are spelled out, since -1 cannot be inferred of zero tokens (no sink).
    pairs = widen(x_BTNH).reshape(*x_BTNH.shape[:-1], x_BTNH.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = table.cos[..., None, :], table.sin[..., None, :]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BTNH.shape).astype(x_BTNH.dtype)
