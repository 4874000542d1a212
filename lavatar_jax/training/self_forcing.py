"""Self-forcing: the student learns on videos that it streams itself.

Method section 4, reference behaviour 11.
Two passes. `roll_out` streams all blocks without gradient and leaves each at its exit step. `replay_gradient`
then repeats one block's exit step after the other, with gradient, while the cache fills again as it did
before. No gradient flows through the cache, so the sum over blocks is the gradient of the whole rollout, and
memory holds one block's graph and one cache however many blocks there are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lavatar_jax.diffusion import TIMESTEPS, FlowSchedule, add_noise
from lavatar_jax.training.flow_grid import FlowGrid

Params = TypeVar("Params")


class Level(NamedTuple):
    """A noise level that a forward works at: its step, what the network is told, and the true level."""

    step: Int[Array, ""] | int  # the context pass has step 0
    t: Float[Array, ""]
    sigma: Float[Array, ""]


class Predict(Protocol):
    """The student's forward: clean latents [B, F, H, W, C] of a block, and the cache with the block in it.

    `inputs` are the block's own (positions, audio, slot).
    """

    def __call__(
        self, params: Any, x: Array, level: Level, inputs: Any, cache: Any, /
    ) -> tuple[Array, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfForcingConfig:
    """How blocks are denoised and remembered.

    `schedule`: the levels of a sampler; None takes `steps` of Self-Forcing's grid, shifted by `shift`.
    `transition`: how a step leads to the next level. "renoise" adds fresh noise to the predicted clean
    latents (Self-Forcing); "euler" keeps the noise that the prediction implies, as the shipped samplers do.
    `cache`: keys and values that later blocks attend to. "noisy": those of the steps themselves, without a
    further forward (Live Avatar's History Corrupt). "context": those of one more forward on the result,
    noised to timestep `context`: 0 is Self-Forcing's clean cache, a larger one a cache of fixed noise.
    """

    schedule: FlowSchedule | None = None
    steps: tuple[int, ...] = (1000, 750, 500, 250)  # of `FlowGrid.denoising_steps`
    shift: float = 5.0
    transition: Literal["renoise", "euler"] = "renoise"
    cache: Literal["noisy", "context"] = "noisy"
    context: float = 0.0
    same_exit: bool = True  # one exit step for all blocks, instead of one for each
    last_only: bool = False  # always leave at the last step
    exit_weights: tuple[float, ...] = ()  # how often to leave at each step; () is uniform
    grad_frames: int = 21  # latent frames at the end of the video that learn
    replay: bool = True  # False: one backward pass through all blocks, whose memory grows with their number

    @property
    def grid(self) -> FlowGrid:
        """The noise levels that timesteps are rounded to."""
        return FlowGrid(shift=self.shift)

    @property
    def timesteps(self) -> np.ndarray:
        """[S] float32: the student's timesteps."""
        return self.grid.denoising_steps(self.steps) if self.schedule is None else self.schedule.timesteps

    @property
    def sigmas(self) -> np.ndarray:
        """[S + 1] float32: the noise level of each step, and 0."""
        if self.schedule is not None:
            return self.schedule.sigmas
        distance = np.abs(self.grid.timesteps - self.timesteps[:, None])
        return np.append(self.grid.sigmas[distance.argmin(axis=1)], np.float32(0))

    def level(self, step: Array) -> Level:
        return Level(step, jnp.asarray(self.timesteps)[step], jnp.asarray(self.sigmas)[step])

    @property
    def context_level(self) -> Level:
        """Of the pass that fills the context cache; on Self-Forcing's grid timestep 0 has a little noise."""
        sigma = self.context / TIMESTEPS if self.schedule is not None else self.grid.sigma(self.context)
        return Level(0, jnp.float32(self.context), jnp.asarray(sigma, jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """What the first pass leaves: results, and where each block's exit step began.

    `context`: what filled the context cache (None: the cache is noisy). `cache`: as it stands at the end.
    """

    x0: Float[Array, "K B F H W C"]
    noisy: Float[Array, "K B F H W C"]
    exits: Int[Array, " K"]
    context: Float[Array, "K B F H W C"] | None
    cache: Any


def draw_exits(key: Array, blocks: int, config: SelfForcingConfig) -> Int[Array, " K"]:
    """A random exit step for each block, by the configuration's rules.

    Raises ValueError where `exit_weights` are not one for each step.
    """
    steps = len(config.timesteps)
    if config.exit_weights and len(config.exit_weights) != steps:
        raise ValueError(f"exit_weights {config.exit_weights} must be one for each of the {steps} steps")
    weights = jnp.asarray(config.exit_weights or (1.0,) * steps, jnp.float32)
    drawn = jax.random.choice(key, steps, (blocks,), p=weights / weights.sum())
    return settle_exits(drawn.astype(jnp.int32), config)


def settle_exits(drawn: Int[Array, " K"], config: SelfForcingConfig) -> Int[Array, " K"]:
    """Exit step of each block from one draw a block, uniform over the steps (all may follow the first)."""
    if config.last_only:
        return jnp.full_like(drawn, len(config.timesteps) - 1)
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
    renoise: Float[Array, "K S B F H W C"] | None,
    exits: Int[Array, " K"],
    inputs: Any,
    cache: Any,
    config: SelfForcingConfig,
    *,
    truth: Float[Array, "K B F H W C"] | None = None,
    starts: Int[Array, "#K B"] | None = None,
) -> Rollout:
    """Stream K blocks without gradient, each from `noise` to its exit step.

    Before the exit, step s predicts clean latents, which are brought to the next level ("renoise": with
    `renoise[:, s]`); the last of the S entries noises the result for the context cache. `renoise` may be None
    where neither happens. `inputs`: pytree with leading axis K.
    Hybrid forcing (method section 6): sample b of block k starts at step `starts[k, b]` (not after the exit)
    from `truth` with `noise` at that step's level; from step 0 this is pure noise.
    """
    sigmas = jnp.asarray(config.sigmas)
    starts = None if starts is None else jnp.broadcast_to(starts, noise.shape[:2])
    params, cache = jax.lax.stop_gradient((params, cache))

    def begin(x: Array, step: Array, noise: Array, clean: Array | None, start: Array | None) -> Array:
        """Where a sample starts from the truth at this very step, that; else x."""
        if clean is None or start is None:
            return x
        here = (start == step).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(here, add_noise(clean, noise, sigmas[step]).astype(x.dtype), x)

    def block(cache: Any, xs: tuple[Any, ...]) -> tuple[Any, tuple[Array, Array, Any]]:
        noise, fresh, exit_step, own, clean, start = xs

        def step(index: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            x, cache = carry
            x = begin(x, index, noise, clean, start)
            x0, cache = predict(params, x, config.level(index), own, cache)
            if config.transition == "euler":
                kept = sigmas[index + 1].astype(x0.dtype) / sigmas[index].astype(x0.dtype)
                following = x0 + kept * (x - x0)
            else:
                following = add_noise(x0, fresh[index], sigmas[index + 1])
            return following.astype(x.dtype), cache

        x, cache = jax.lax.fori_loop(0, exit_step, step, (noise, cache))
        x = begin(x, exit_step, noise, clean, start)
        x0, cache = predict(params, x, config.level(exit_step), own, cache)
        context = None
        if config.cache == "context":
            context = add_noise(x0, fresh[-1], config.context_level.sigma)
            _, cache = predict(params, context, config.context_level, own, cache)
        return cache, (x0, x, context)

    steps = (noise, renoise, exits, inputs, truth, starts)
    cache, (x0, noisy, context) = jax.lax.scan(block, cache, steps)
    return Rollout(x0, noisy, exits, context, cache)


def gradient_of_rollout(
    predict: Predict,
    params: Params,
    rollout: Rollout,
    inputs: Any,
    cache: Any,
    slope: Float[Array, "K B F H W C"],
    learning: Bool[Array, " K"],
    config: SelfForcingConfig,
) -> Params:
    """What `replay_gradient` computes, and its arguments, by one backward pass through the whole rollout.

    Much memory, as the graphs of all blocks are kept; for comparison (`SelfForcingConfig.replay`).
    """
    fixed, cache = jax.lax.stop_gradient((params, cache))

    def results(params: Params) -> Array:
        def block(cache: Any, xs: tuple[Any, ...]) -> tuple[Any, Array]:
            x, exit_step, context, own = xs
            x0, filled = predict(params, x, config.level(exit_step), own, cache)
            if context is not None:
                _, filled = predict(fixed, context, config.context_level, own, filled)
            return jax.lax.stop_gradient(filled), x0

        _, x0 = jax.lax.scan(block, cache, (rollout.noisy, rollout.exits, rollout.context, inputs))
        return x0

    x0, transpose = jax.vjp(results, params)
    learning = learning.reshape(-1, *(1,) * (slope.ndim - 1))
    (gradient,) = transpose(jnp.where(learning, slope, 0.0).astype(x0.dtype))
    return gradient


def replay_gradient(
    predict: Predict,
    params: Params,
    rollout: Rollout,
    inputs: Any,
    cache: Any,
    slope: Float[Array, "K B F H W C"],
    learning: Bool[Array, " K"],
    config: SelfForcingConfig,
) -> Params:
    """Gradient by `params` of a loss whose derivative by the rollout's results is `slope`.

    `cache`: the one that the rollout began with. It fills again block by block, so that each block sees what
    it saw before and nothing of all blocks is kept but their latents. The gradients of blocks add up in a
    scan, which holds one block's graph at a time. Blocks that are not `learning` only fill the cache.
    """
    fixed, cache = jax.lax.stop_gradient((params, cache))

    def block(carry: tuple[Params, Any], xs: tuple[Any, ...]) -> tuple[tuple[Params, Any], None]:
        total, cache = carry
        x, exit_step, context, pull, own, keep = xs
        level = config.level(exit_step)

        def teach(total: Params, cache: Any) -> tuple[Params, Any]:
            x0, transpose, filled = jax.vjp(
                lambda params: predict(params, x, level, own, cache), params, has_aux=True
            )
            (gradient,) = transpose(pull.astype(x0.dtype))
            return jax.tree.map(jnp.add, total, gradient), filled

        def pass_by(total: Params, cache: Any) -> tuple[Params, Any]:
            return total, predict(fixed, x, level, own, cache)[1]

        total, filled = jax.lax.cond(keep, teach, pass_by, total, cache)
        if context is not None:
            _, filled = predict(fixed, context, config.context_level, own, filled)
        return (total, filled), None

    zero = jax.tree.map(jnp.zeros_like, params)
    steps = (rollout.noisy, rollout.exits, rollout.context, slope, inputs, learning)
    (total, _), _ = jax.lax.scan(block, (zero, cache), steps)
    return total
