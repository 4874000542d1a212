"""Self-forcing: the student learns on videos that it streams itself.

Method section 4, reference behaviour 11.
Two passes. `roll_out` streams all blocks without gradient and leaves each at its exit step. `replay_gradient`
then repeats one block's exit step after the other, with gradient, against the finished cache. No gradient
flows through the cache, so their sum is the gradient of the whole rollout, with one block's graph in memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lavatar_jax.diffusion import TIMESTEPS
from lavatar_jax.training.flow_grid import FlowGrid

Params = TypeVar("Params")


class Predict(Protocol):
    """The student's forward: clean latents [B, F, H, W, C] of a block and the cache with its keys and values.

    `t` [] is the timestep that the network is told; `inputs` are the block's own (position, audio, slot).
    For the replay a block must see earlier blocks and itself only, although the cache holds later ones.
    """

    def __call__(self, params: Any, x: Array, t: Array, inputs: Any, cache: Any, /) -> tuple[Array, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfForcingConfig:
    """How blocks are denoised and remembered.

    `cache`: keys and values that later blocks attend to. "noisy": those of the exit step, without a further
    forward (Live Avatar's History Corrupt). "context": those of one more forward on the result, noised to
    timestep `context`: 0 is Self-Forcing's clean cache, a larger one a cache of fixed noise.
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)  # of `FlowGrid.denoising_steps`
    shift: float = 5.0
    cache: Literal["noisy", "context"] = "noisy"
    context: float = 0.0
    same_exit: bool = True  # one exit step for all blocks, instead of one for each
    last_only: bool = False  # always leave at the last step
    grad_frames: int = 21  # latent frames at the end of the video that learn

    @property
    def grid(self) -> FlowGrid:
        """The noise levels that timesteps are rounded to."""
        return FlowGrid(shift=self.shift)

    @property
    def timesteps(self) -> np.ndarray:
        """[S] float32: the student's timesteps."""
        return self.grid.denoising_steps(self.steps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """What the first pass leaves: results, and where each block's exit step began."""

    x0: Float[Array, "K B F H W C"]
    noisy: Float[Array, "K B F H W C"]
    t: Float[Array, " K"]
    cache: Any


def settle_exits(drawn: Int[Array, " K"], config: SelfForcingConfig) -> Int[Array, " K"]:
    """Exit step of each block from one draw a block, uniform over the steps (all may follow the first)."""
    if config.last_only:
        return jnp.full_like(drawn, len(config.steps) - 1)
    return jnp.broadcast_to(drawn[0], drawn.shape) if config.same_exit else drawn


def denoised_range(exit_step: int, config: SelfForcingConfig) -> tuple[int, int]:
    """Entries, counted from the grid's end, of an exit step and of the one after it (0: there is none).

    They bound the timesteps of the DMD loss (`draw_timestep`). Undefined where blocks exit differently.
    """
    entries = [TIMESTEPS - int(index) for index in config.grid.nearest(config.timesteps)]
    return entries[exit_step], (*entries, 0)[exit_step + 1]


def learns(first_frames: Int[Array, " K"], total_frames: int, config: SelfForcingConfig) -> Bool[Array, " K"]:
    """Which blocks get a gradient: those that begin within the last `grad_frames` of `total_frames`."""
    return first_frames >= total_frames - config.grad_frames


def roll_out(
    predict: Predict,
    params: Any,
    noise: Float[Array, "K B F H W C"],
    renoise: Float[Array, "K S B F H W C"],
    exits: Int[Array, " K"],
    inputs: Any,
    cache: Any,
    config: SelfForcingConfig,
) -> Rollout:
    """Stream K blocks without gradient, each from `noise` to its exit step.

    Before the exit, step s predicts clean latents, which `renoise[:, s]` noises to the next timestep; the
    last of the S entries noises the result for the context cache. `inputs`: pytree with leading axis K.
    """
    grid, timesteps = config.grid, jnp.asarray(config.timesteps)
    params, cache = jax.lax.stop_gradient((params, cache))

    def block(cache: Any, xs: tuple[Array, Array, Array, Any]) -> tuple[Any, tuple[Array, Array, Array]]:
        x, fresh, exit_step, own = xs

        def step(index: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            x, cache = carry
            x0, cache = predict(params, x, timesteps[index], own, cache)
            return grid.add_noise(x0, fresh[index], timesteps[index + 1]).astype(x.dtype), cache

        x, cache = jax.lax.fori_loop(0, exit_step, step, (x, cache))
        t = timesteps[exit_step]
        x0, cache = predict(params, x, t, own, cache)
        if config.cache == "context":
            context = jnp.asarray(config.context, timesteps.dtype)
            _, cache = predict(params, grid.add_noise(x0, fresh[-1], context), context, own, cache)
        return cache, (x0, x, t)

    cache, (x0, noisy, t) = jax.lax.scan(block, cache, (noise, renoise, exits, inputs))
    return Rollout(x0, noisy, t, cache)


def replay_gradient(
    predict: Predict,
    params: Params,
    rollout: Rollout,
    inputs: Any,
    slope: Float[Array, "K B F H W C"],
    learning: Bool[Array, " K"],
) -> Params:
    """Gradient by `params` of a loss whose derivative by the rollout's results is `slope`.

    The gradients of blocks add up in a scan, which holds one block's graph at a time. Blocks that are not
    `learning` are computed like the others, but add nothing.
    """

    def block(total: Params, xs: tuple[Array, Array, Array, Any, Array]) -> tuple[Params, None]:
        x, t, pull, own, keep = xs
        x0, transpose = jax.vjp(lambda params: predict(params, x, t, own, rollout.cache)[0], params)
        (gradient,) = transpose(jnp.where(keep, pull, 0).astype(x0.dtype))
        return jax.tree.map(jnp.add, total, gradient), None

    zero = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(block, zero, (rollout.noisy, rollout.t, slope, inputs, learning))
    return total
