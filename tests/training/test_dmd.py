"""The distillation losses: what they are the gradient of, and what they leave alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.training.dmd import (
    DMDConfig,
    critic_loss,
    dmd_loss,
    draw_timestep,
    normalise,
    score_difference,
    shift_timestep,
    surrogate_loss,
)
from lavatar_jax.training.flow_grid import FlowGrid

SHAPE = (2, 3, 2, 2, 4)
CONFIG, GRID = DMDConfig(), FlowGrid()
T = jnp.full(SHAPE[:2], 500.0)


def normal(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)


def constant(value: jax.Array):
    return lambda noisy, t: value


NETWORKS = {"real": constant(normal(1)), "real_uncond": constant(normal(2)), "fake": constant(normal(3))}


def test_the_student_moves_from_the_critics_guess_to_the_teachers() -> None:
    x, noise = normal(0), normal(4)
    slope = jax.grad(lambda x: dmd_loss(x, noise, T, CONFIG, GRID, **NETWORKS)[0])(x)
    real = normal(1) + 3.0 * (normal(1) - normal(2))
    distance = jnp.mean(jnp.abs(x - real), axis=(1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(slope, (normal(3) - real) / distance / x.size, rtol=1e-4, atol=1e-7)


def test_no_gradient_passes_through_the_score_networks() -> None:
    def loss(scale: jax.Array) -> jax.Array:
        networks = {name: lambda noisy, t: scale * noisy for name in NETWORKS}
        return dmd_loss(normal(0), normal(4), T, CONFIG, GRID, **networks)[0]

    assert jax.grad(loss)(0.5) == 0


def test_what_is_masked_gets_no_gradient_and_the_rest_keeps_its_mean() -> None:
    x, gradient = normal(0), normal(1)
    mask = jnp.zeros(SHAPE, bool).at[:, 1:].set(True)
    slope = jax.grad(surrogate_loss)(x, gradient, mask)
    np.testing.assert_allclose(slope, jnp.where(mask, gradient / mask.sum(), 0.0), rtol=1e-4, atol=1e-8)


def test_a_perfect_teacher_gives_a_finite_gradient() -> None:
    x = normal(0)
    assert jnp.isfinite(normalise(normal(1), x, x)).all()
    np.testing.assert_array_equal(normalise(jnp.zeros(SHAPE), x, x), jnp.zeros(SHAPE))


def test_guidance_of_the_fake_score_is_an_option() -> None:
    guided = dataclasses.replace(CONFIG, fake_guidance=2.0)
    plain, _ = score_difference(normal(0), T, CONFIG, **NETWORKS)
    with pytest.raises(ValueError, match="leads away from"):
        score_difference(normal(0), T, guided, **NETWORKS)
    difference, _ = score_difference(normal(0), T, guided, **NETWORKS, fake_uncond=constant(normal(5)))
    np.testing.assert_allclose(difference - plain, 2.0 * (normal(3) - normal(5)), rtol=1e-4, atol=1e-5)


def test_guidance_by_the_prompt_adds_to_the_teachers_other_guidance() -> None:
    guided = dataclasses.replace(CONFIG, text_guidance=0.5)
    plain, plain_real = score_difference(normal(0), T, CONFIG, **NETWORKS)
    with pytest.raises(ValueError, match="leads away from"):
        score_difference(normal(0), T, guided, **NETWORKS)
    difference, real = score_difference(normal(0), T, guided, **NETWORKS, real_no_text=constant(normal(5)))
    push = 0.5 * (normal(1) - normal(5))
    np.testing.assert_allclose(real - plain_real, push, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(difference - plain, -push, rtol=1e-4, atol=1e-5)


def test_a_perfect_critic_has_no_loss_and_only_the_critic_learns() -> None:
    x, noise = normal(0), normal(4)
    assert critic_loss(x, noise, T, GRID, constant(x)) < 1e-9
    slope = jax.grad(lambda x: critic_loss(x, noise, T, GRID, constant(normal(1))))(x)
    np.testing.assert_array_equal(slope, 0.0)


def test_timesteps_are_shifted_then_clamped() -> None:
    np.testing.assert_allclose(shift_timestep([0, 500, 999], CONFIG), [20, 2500 / 3, 980], rtol=1e-6)
    unshifted = dataclasses.replace(CONFIG, shift=1.0)
    np.testing.assert_array_equal(shift_timestep([0, 500, 999], unshifted), [20, 500, 980])


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [({}, 0, 1000), ({"below_exit": True}, 0, 500), ({"above_next": True}, 250, 1000)],
)
def test_the_exit_step_bounds_the_draw_only_if_asked(options: dict[str, bool], low: int, high: int) -> None:
    config = dataclasses.replace(CONFIG, **options)
    drawn = np.asarray(draw_timestep(jax.random.key(0), 4096, config, exit_from=500, exit_to=250))
    assert low <= drawn.min() < low + 20
    assert high - 20 < drawn.max() < high
