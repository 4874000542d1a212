"""Flow matching: noise levels of the sampler, Euler steps, and conversions between x0, noise and velocity.

The path is `x = (1 - sigma) x0 + sigma noise` and the network predicts `v = noise - x0` (method section 1).
Levels of a frame or a sample are given by the leading axes of `sigma`: [] for all, [B] per sample, [B, F]
per frame of a latent [B, F, H, W, C]. Arithmetic is at least float32 whatever the latent's type.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Levels = TypeVar("Levels", float, np.ndarray, jax.Array)

TIMESTEPS = 1000  # the network is told t = 1000 * sigma


def shift_sigma(sigma: Levels, shift: float) -> Levels:
    """Moves noise levels in [0, 1] towards 1: `shift * s / (1 + (shift - 1) * s)`; 0 and 1 stay."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """The noise levels of a sampler with any number of steps.

    `doubly_shifted`: the released pipelines shift twice. Their scheduler shifts its range first, so that
    the smallest level is `s(1/1000)` instead of 0, then shifts an even grid over that range again; the last
    step thus starts at sigma 0.0089 and hardly changes anything. Checkpoints distilled with it need it.
    Otherwise an even grid over [0, 1] is shifted once, as Self-Forcing's `denoising_step_list` does.
    """

    steps: int = 4
    shift: float = 3.0
    doubly_shifted: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a schedule needs at least 1 step, not {self.steps}")
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, not {self.shift}")

    @property
    def sigmas(self) -> np.ndarray:
        """[steps + 1] float32, falling from 1 to 0: step i goes from `sigmas[i]` to `sigmas[i + 1]`."""
        if self.doubly_shifted:
            smallest = shift_sigma(1.0 / TIMESTEPS, self.shift)
            grid = np.append(np.linspace(1.0, smallest, self.steps), 0.0)
        else:
            grid = np.linspace(1.0, 0.0, self.steps + 1)
        return shift_sigma(grid, self.shift).astype(np.float32)

    @property
    def timesteps(self) -> np.ndarray:
        """[steps] float32: what the network is told at each step."""
        return TIMESTEPS * self.sigmas[:-1]


def euler_step(x: jax.Array, v: jax.Array, sigma: ArrayLike, next_sigma: ArrayLike) -> jax.Array:
    """One Euler step along the predicted velocity, from noise level `sigma` to `next_sigma`."""
    step = _like(next_sigma, x) - _like(sigma, x)
    return (_wide(x) + step * _wide(v)).astype(x.dtype)


def add_noise(x0: jax.Array, noise: jax.Array, sigma: ArrayLike) -> jax.Array:
    """The point of the path at noise level `sigma`."""
    level = _like(sigma, x0)
    mixed = (1.0 - level) * _wide(x0) + level * _wide(noise)
    return mixed.astype(x0.dtype)


def velocity(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """The regression target `noise - x0` [float32]."""
    return _wide(noise) - _wide(x0)


def v_to_x0(x: jax.Array, v: jax.Array, sigma: ArrayLike) -> jax.Array:
    """The clean latent that a velocity at noise level `sigma` points to [float32]."""
    return _wide(x) - _like(sigma, x) * _wide(v)


def x0_to_v(x: jax.Array, x0: jax.Array, sigma: ArrayLike) -> jax.Array:
    """The velocity that leads from `x` at noise level `sigma` > 0 to `x0` [float32]."""
    return (_wide(x) - _wide(x0)) / _like(sigma, x)


def _wide(x: jax.Array) -> jax.Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _like(sigma: ArrayLike, x: jax.Array) -> jax.Array:
    """Noise levels as float32 that broadcast over the trailing axes of `x`."""
    level = jnp.asarray(sigma, jnp.float32)
    return level.reshape(level.shape + (1,) * (x.ndim - level.ndim))
