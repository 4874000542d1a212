"""DynaForcing: what keeps motion alive where a student would settle on the teacher's favourite video.

Method section 6. Hybrid starts: some samples are streamed from noised truth instead of noise. Dynamics
reward: samples that move count more in the DMD gradient.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lavatar_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynaConfig:
    """Off by default: plain Self-Forcing.

    `rewards`: ("package.module:factory", weight) pairs. `factory(run) -> Reward`; the weights multiply each
    reward after it was normalised by its running mean and deviation.
    """

    hybrid: float = 0.0  # share of the samples that start from noised truth
    start_weights: tuple[float, ...] = ()  # how often at step 1, 2, ...; (): half as often with every step
    alpha: float = 0.0  # samples are weighted by exp(alpha * reward)
    rewards: tuple[tuple[str, float], ...] = ()
    reward_decay: float = 0.98  # of the running statistics
    reward_limit: float = 3.0  # largest absolute reward that counts, in deviations


class Reward(NamedTuple):
    """`measure(arrays, clip [B, F, H, W, C], batch) -> [B]`, larger is livelier; `arrays` are not trained.

    Each sample is measured by itself: B is that of a part of the batch (`LoopConfig.accumulate`).
    """

    measure: Callable[[Any, Array, dict[str, Array]], Array]
    arrays: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardStatistics:
    """Running moments of N rewards; `weight` corrects the start at zero."""

    mean: Float[Array, " N"]
    square: Float[Array, " N"]
    weight: Float[Array, ""]

    @classmethod
    def empty(cls, count: int) -> RewardStatistics:
        some = max(count, 1)  # checkpoints cannot hold empty arrays
        return cls(mean=jnp.zeros(some), square=jnp.zeros(some), weight=jnp.zeros(()))


def load_rewards(config: DynaConfig, run: Any) -> list[Reward]:
    """The rewards that a configuration names. Raises UserError where one cannot be found."""
    rewards = []
    for name, _ in config.rewards:
        module, _, attribute = name.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError):
            raise UserError(
                f'there is no reward "{name}": name a factory as "package.module:function"'
            ) from None
        rewards.append(factory(run))
    return rewards


def check_starts(config: DynaConfig, steps: int) -> None:
    """Raises UserError for hybrid starts that a sampler of so many steps cannot have."""
    if config.hybrid and steps < 2:
        raise UserError("one step begins at pure noise, where no truth is left: --dyna.hybrid 0")
    weights = config.start_weights
    if weights and (len(weights) != steps - 1 or min(weights) < 0 or sum(weights) <= 0):
        raise UserError(f"--dyna.start-weights {weights} must be one for each of the steps 1 to {steps - 1}")


def draw_starts(
    key: Array, batch: int, exit_step: Int[Array, ""], steps: int, config: DynaConfig
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """(start step of each sample, whether it starts from noised truth).

    Step 0 is pure noise, with nothing of the truth: hybrid samples start at one of the steps after it, and
    not after the exit. Where the exit is step 0 there are none.
    """
    which, step = jax.random.split(key)
    hybrid = (jax.random.uniform(which, (batch,)) < config.hybrid) & (exit_step > 0)
    weights = jnp.asarray(config.start_weights or [0.5**index for index in range(steps - 1)], jnp.float32)
    drawn = 1 + jax.random.choice(step, steps - 1, (batch,), p=weights / weights.sum())
    return jnp.where(hybrid, jnp.minimum(drawn, exit_step), 0).astype(jnp.int32), hybrid


def update_statistics(
    statistics: RewardStatistics, values: Float[Array, "N B"], decay: float
) -> RewardStatistics:
    """Moments after one more batch."""

    def average(old: Array, new: Array) -> Array:
        return decay * old + (1.0 - decay) * new

    return RewardStatistics(
        mean=average(statistics.mean, values.mean(axis=1)),
        square=average(statistics.square, jnp.square(values).mean(axis=1)),
        weight=average(statistics.weight, jnp.ones(())),
    )


def reward_weights(
    statistics: RewardStatistics, values: Float[Array, "N B"], config: DynaConfig
) -> Float[Array, " B"]:
    """exp(alpha R) of each sample; R sums the normalised rewards. No gradient passes."""
    mean = (statistics.mean / statistics.weight)[:, None]
    variance = (statistics.square / statistics.weight)[:, None] - jnp.square(mean)
    normalised = (values - mean) * jax.lax.rsqrt(jnp.maximum(variance, 0.0) + 1e-6)
    scales = jnp.array([weight for _, weight in config.rewards], jnp.float32)
    total = jnp.clip(scales @ normalised, -config.reward_limit, config.reward_limit)
    return jax.lax.stop_gradient(jnp.exp(config.alpha * total))
