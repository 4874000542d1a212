"""The thousand noise levels that Self-Forcing trains on (reference behaviour 11).

Training names a noise level by its timestep, and every use of one rounds it to the nearest of the grid's
timesteps. The smallest level is not 0: a sample "at timestep 0" still carries a little noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lavatar_jax import diffusion
from lavatar_jax.diffusion import TIMESTEPS, shift_sigma


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowGrid:
    """A grid over (0, 1], shifted towards 1.

    Timesteps are [] for all, [B] per sample or [B, F] per frame of a latent [B, F, H, W, C], between 0 and
    1000. Conversions are float32, where the reference's are float64 inside.
    """

    shift: float = 5.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, not {self.shift}")

    @property
    def sigmas(self) -> np.ndarray:
        """[1000] float32, falling from 1; the last is 0.005 for shift 5."""
        return shift_sigma(np.linspace(1.0, 0.0, TIMESTEPS + 1)[:-1], self.shift).astype(np.float32)

    @property
    def timesteps(self) -> np.ndarray:
        """[1000] float32: 1000 * sigma."""
        return TIMESTEPS * self.sigmas

    @property
    def weights(self) -> np.ndarray:
        """[1000] float32: loss weights of mean 1, a bell around timestep 500 that is 0 at pure noise."""
        distance = (self.timesteps.astype(np.float64) - TIMESTEPS / 2) / TIMESTEPS
        bell = np.exp(-2.0 * np.square(distance))
        bell -= bell.min()
        return (bell * (TIMESTEPS / bell.sum())).astype(np.float32)

    def nearest(self, t: ArrayLike) -> jax.Array:
        """Index of the nearest timestep of the grid, the first (noisier) one on ties; shape of `t`."""
        distance = jnp.abs(self.timesteps - jnp.asarray(t, jnp.float32)[..., None])
        return jnp.argmin(distance, axis=-1)

    def sigma(self, t: ArrayLike) -> jax.Array:
        """Noise level at the nearest timestep of the grid; shape of `t`."""
        return jnp.asarray(self.sigmas)[self.nearest(t)]

    def weight(self, t: ArrayLike) -> jax.Array:
        """Loss weight at the nearest timestep of the grid; shape of `t`."""
        return jnp.asarray(self.weights)[self.nearest(t)]

    def add_noise(self, x0: jax.Array, noise: jax.Array, t: ArrayLike) -> jax.Array:
        """The point of the path at the nearest timestep."""
        return diffusion.add_noise(x0, noise, self.sigma(t))

    def flow_to_x0(self, x: jax.Array, flow: jax.Array, t: ArrayLike) -> jax.Array:
        """The clean latent that a velocity at `x` points to."""
        return diffusion.v_to_x0(x, flow, self.sigma(t))

    def x0_to_flow(self, x: jax.Array, x0: jax.Array, t: ArrayLike) -> jax.Array:
        """The velocity that leads from `x` to `x0`; finite at every timestep, since no level is 0."""
        return diffusion.x0_to_v(x, x0, self.sigma(t))

    def denoising_steps(self, steps: Sequence[int], *, warp: bool = True) -> np.ndarray:
        """[S] float32: the student's timesteps, from a falling list like (1000, 750, 500, 250).

        With `warp` the list counts entries of the shifted grid: entry `1000 - k` for k. Raises ValueError
        where the list does not fall, or leaves 1..1000.
        """
        list_ = np.asarray(steps, np.int64)
        if list_.size == 0 or list_.max() > TIMESTEPS or list_.min() < 1 or (np.diff(list_) >= 0).any():
            raise ValueError(f"denoising steps must fall within {TIMESTEPS}..1, not {tuple(steps)}")
        return self.timesteps[TIMESTEPS - list_] if warp else list_.astype(np.float32)
