"""Distribution matching distillation: what teaches the student, and what teaches its critic.

Method section 4, reference behaviour 11. The student's latents are noised; a frozen teacher (the real score)
and a critic that follows the student (the fake score) each guess what was there before; the student moves
from the critic's guess towards the teacher's. Networks come in as functions, so this file knows none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from lavatar_jax.diffusion import TIMESTEPS, shift_sigma, velocity
from lavatar_jax.training.flow_grid import FlowGrid

# (noisy latents [B, F, H, W, C], timesteps [B, F]) -> clean latents
Denoiser = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMDConfig:
    """How timesteps are drawn and predictions guided. The defaults are Self-Forcing's."""

    shift: float = 5.0  # of timesteps towards 1000
    lowest: float = 20.0  # timesteps are clamped to this range after the shift
    highest: float = 980.0
    below_exit: bool = False  # draw only timesteps below the step at which the rollout was left
    above_next: bool = False  # draw only timesteps above the step that would have come next
    guidance: float = 3.0  # of the real score: cond + guidance * (cond - uncond)
    text_guidance: float = 0.0  # besides, away from the real score with no prompt; 0 saves a forward
    fake_guidance: float = 0.0  # of the fake score; 0 saves its second forward


def draw_timestep(
    key: Array,
    batch: int,
    config: DMDConfig,
    *,
    exit_from: ArrayLike = TIMESTEPS,
    exit_to: ArrayLike = 0,
) -> Int[Array, " B"]:
    """One whole timestep a sample, uniform in [lowest, highest), not yet shifted.

    `exit_from`, `exit_to`: entries, counted from the grid's end, of the step at which the rollout was left
    and of the one after it (`denoised_range`); they bound the draw where the configuration says so.
    """
    low = jnp.asarray(exit_to if config.above_next else 0, jnp.int32)
    high = jnp.asarray(exit_from if config.below_exit else TIMESTEPS, jnp.int32)
    return jax.random.randint(key, (batch,), low, high)


def shift_timestep(t: ArrayLike, config: DMDConfig) -> Array:
    """A drawn timestep [...] as the networks are told it [float32]: shifted, then clamped."""
    t = jnp.asarray(t, jnp.float32)
    if config.shift > 1:
        t = TIMESTEPS * shift_sigma(t / TIMESTEPS, config.shift)
    return jnp.clip(t, config.lowest, config.highest)


def guide(cond: Array, *away: tuple[float, Callable[[], Array]]) -> Array:
    """Classifier-free guidance as Self-Forcing counts it: scale 0 is the conditional prediction.

    `away`: pairs of a scale and what gives the prediction to lead away from; called if the scale is not 0.
    """
    return cond + sum(scale * (cond - uncond()) for scale, uncond in away if scale)


def score_difference(
    noisy: Float[Array, "B F H W C"],
    t_BF: Float[Array, "B F"],
    config: DMDConfig,
    *,
    real: Denoiser,
    real_uncond: Denoiser | None = None,
    real_no_text: Denoiser | None = None,
    fake: Denoiser,
    fake_uncond: Denoiser | None = None,
) -> tuple[Float[Array, "B F H W C"], Float[Array, "B F H W C"]]:
    """(fake - real, real): how the two guided predictions of the clean latents differ, and the teacher's.

    What guidance leads away from is only called where its scale is not 0; ValueError if it is then missing.
    """

    def ask(uncond: Denoiser | None) -> Array:
        if uncond is None:
            raise ValueError("guidance needs the prediction that it leads away from")
        return uncond(noisy, t_BF)

    guess_real = guide(
        real(noisy, t_BF),
        (config.guidance, lambda: ask(real_uncond)),
        (config.text_guidance, lambda: ask(real_no_text)),
    )
    guess_fake = guide(fake(noisy, t_BF), (config.fake_guidance, lambda: ask(fake_uncond)))
    return guess_fake - guess_real, guess_real


def normalise(
    difference: Float[Array, "B F H W C"], x: Float[Array, "B F H W C"], real: Float[Array, "B F H W C"]
) -> Float[Array, "B F H W C"]:
    """The DMD gradient: the difference over the teacher's mean distance |x - real|, one number a sample.

    So a sample counts the same at every noise level. Where the distance is 0 the gradient is finite.
    """
    distance = jnp.mean(jnp.abs(x - real), axis=tuple(range(1, x.ndim)), keepdims=True)
    return jnp.nan_to_num(difference / distance)


def surrogate_loss(
    x: Float[Array, "B F H W C"],
    gradient: Float[Array, "B F H W C"],
    mask: Bool[Array, "B F H W C"] | None = None,
) -> Float[Array, ""]:
    """`0.5 mean((x - stop(x - gradient))^2)`: a loss whose derivative by `x` is `gradient / size`.

    With a mask (True: counts) the mean is over what counts, and the rest gets no gradient.
    """
    target = jax.lax.stop_gradient(x - gradient)
    return 0.5 * jnp.mean(jnp.square(x - target), where=mask)


def dmd_loss(
    x: Float[Array, "B F H W C"],
    noise: Float[Array, "B F H W C"],
    t_BF: Float[Array, "B F"],
    config: DMDConfig,
    grid: FlowGrid,
    *,
    mask: Bool[Array, "B F H W C"] | None = None,
    weight: Array | float = 1.0,
    **networks: Denoiser,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Loss of the student's latents `x`, and {"dmd_gradient_norm"}: the gradient's mean magnitude.

    `networks` as in `score_difference`; no gradient passes through them. `t_BF`: from `shift_timestep`.
    `weight` [B, 1 or F, ...] multiplies the gradient: rewards of samples, or places that count more.
    """
    fixed = jax.lax.stop_gradient(x)
    noisy = grid.add_noise(fixed, noise, t_BF)
    difference, real = score_difference(noisy, t_BF, config, **networks)
    gradient = jax.lax.stop_gradient(normalise(difference, fixed, real))
    loss = surrogate_loss(x, jax.lax.stop_gradient(weight) * gradient, mask)
    return loss, {"dmd_gradient_norm": jnp.mean(jnp.abs(gradient))}


def critic_loss(
    x: Float[Array, "B F H W C"],
    noise: Float[Array, "B F H W C"],
    t_BF: Float[Array, "B F"],
    grid: FlowGrid,
    fake: Denoiser,
) -> Float[Array, ""]:
    """Flow-matching loss of the fake score on the student's latents `x`, which get no gradient.

    The velocity is derived anew from the predicted clean latents, at the grid's noise level.
    """
    x = jax.lax.stop_gradient(x)
    noisy = grid.add_noise(x, noise, t_BF)
    flow = grid.x0_to_flow(noisy, fake(noisy, t_BF), t_BF)
    return jnp.mean(jnp.square(flow - velocity(x, noise)))
