"""The rollout that trains the student, and the replay that gives its gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.diffusion import FlowSchedule
from lavatar_jax.training.self_forcing import (
    SelfForcingConfig,
    denoised_range,
    draw_exits,
    gradient_of_rollout,
    learns,
    replay_gradient,
    roll_out,
    settle_exits,
)

CONFIG = SelfForcingConfig(steps=(1000, 500, 250))
BLOCKS, SHAPE = 4, (2, 3, 2, 2, 3)  # of one block: B F H W C
STARTS = jnp.arange(BLOCKS)


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def predict(params, x, level, block, cache):
    """Every value attends to its own past blocks and itself, by weights that the parameters shape."""
    key = jnp.tanh(x * params["key"] + 0.0003 * jnp.asarray(level.t, x.dtype))
    cache = cache.at[block].set(key)
    seen = jnp.where(jnp.arange(BLOCKS).reshape(-1, 1, 1, 1, 1, 1) <= block, cache * key, -jnp.inf)
    return jnp.tanh((jax.nn.softmax(seen, axis=0) * cache).sum(0) * params["out"] + 0.1 * x), cache


def draw(dtype=jnp.float32):
    params = {"key": normal(0, 3, dtype=dtype), "out": normal(1, 3, dtype=dtype)}
    noise, renoise = normal(2, BLOCKS, *SHAPE, dtype=dtype), normal(3, BLOCKS, 3, *SHAPE, dtype=dtype)
    return params, noise, renoise, jnp.zeros((BLOCKS, *SHAPE), dtype)


def rollout_by_hand(params, noise, renoise, exits, cache, config):
    """The same in a Python loop, with gradient through each block's exit step only."""
    outputs = []
    for block in range(BLOCKS):
        x = noise[block]
        for step in range(exits[block]):
            x0, cache = jax.lax.stop_gradient(predict(params, x, config.level(step), block, cache))
            if config.transition == "euler":
                level, following = np.float64(config.sigmas[step : step + 2])
                x = x + (following - level) * (x - x0) / level
            else:
                x = config.grid.add_noise(x0, renoise[block, step], config.timesteps[step + 1])
        x0, cache = predict(params, x, config.level(exits[block]), block, cache)
        if config.cache == "context":
            noisy = config.grid.add_noise(x0, renoise[block, -1], config.context)
            _, cache = predict(params, noisy, config.context_level, block, cache)
        outputs.append(x0)
        cache = jax.lax.stop_gradient(cache)
    return jnp.stack(outputs)


@pytest.mark.parametrize("exits", [(0,) * 4, (1,) * 4, (2,) * 4, (2, 0, 1, 2)])
@pytest.mark.parametrize("options", [{}, {"transition": "euler"}, {"cache": "context", "context": 100.0}])
def test_replayed_gradients_are_those_of_the_whole_rollout(exits, options) -> None:
    config = dataclasses.replace(CONFIG, **options)
    with jax.enable_x64(True):
        params, noise, renoise, cache = draw(jnp.float64)
        pull = normal(4, BLOCKS, *SHAPE, dtype=jnp.float64)
        results, transpose = jax.vjp(
            lambda params: rollout_by_hand(params, noise, renoise, exits, cache, config), params
        )
        done = roll_out(predict, params, noise, renoise, jnp.array(exits), STARTS, cache, config)
        everywhere = jnp.ones(BLOCKS, bool)
        got = replay_gradient(predict, params, done, STARTS, cache, pull, everywhere, config)
        want = transpose(pull)[0]
        at_once = gradient_of_rollout(predict, params, done, STARTS, cache, pull, everywhere, config)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), at_once, want)
        assert got["key"].dtype == jnp.float64
        np.testing.assert_allclose(done.x0, results, rtol=0, atol=1e-10)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), got, want)


def test_only_learning_blocks_add_to_the_gradient() -> None:
    params, noise, renoise, cache = draw()
    done = roll_out(predict, params, noise, renoise, jnp.ones(BLOCKS, int), STARTS, cache, CONFIG)
    pull, last = normal(4, BLOCKS, *SHAPE), jnp.arange(BLOCKS) == BLOCKS - 1
    got = replay_gradient(predict, params, done, STARTS, cache, pull, last, CONFIG)
    at_once = gradient_of_rollout(predict, params, done, STARTS, cache, pull, last, CONFIG)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), at_once, got)
    masked, everywhere = pull * last.reshape(-1, 1, 1, 1, 1, 1), jnp.ones(BLOCKS, bool)
    want = replay_gradient(predict, params, done, STARTS, cache, masked, everywhere, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jnp.abs(got["out"]).max() > 0


def test_the_kind_of_cache_changes_later_blocks_but_not_the_first() -> None:
    params, noise, renoise, cache = draw()

    def run(**options) -> jax.Array:
        config, exits = dataclasses.replace(CONFIG, **options), jnp.ones(BLOCKS, int)
        return roll_out(predict, params, noise, renoise, exits, STARTS, cache, config).x0

    noisy, clean, fixed = run(), run(cache="context"), run(cache="context", context=300.0)
    np.testing.assert_array_equal(noisy[0], clean[0])
    for one, other in ((noisy, clean), (clean, fixed), (noisy, fixed)):
        assert jnp.abs(one[1:] - other[1:]).max() > 1e-3


def test_exits_are_settled_once_for_all_blocks_unless_asked() -> None:
    drawn = jnp.array([1, 0, 2])
    np.testing.assert_array_equal(settle_exits(drawn, CONFIG), [1, 1, 1])
    np.testing.assert_array_equal(settle_exits(drawn, dataclasses.replace(CONFIG, same_exit=False)), drawn)
    np.testing.assert_array_equal(settle_exits(drawn, dataclasses.replace(CONFIG, last_only=True)), [2, 2, 2])


def test_the_range_of_an_exit_ends_where_the_next_step_begins() -> None:
    assert [denoised_range(step, CONFIG) for step in range(3)] == [(1000, 500), (500, 250), (250, 0)]


def test_the_last_frames_learn() -> None:
    np.testing.assert_array_equal(learns(jnp.array([0, 3, 6, 9]), 27, CONFIG), [False, False, True, True])


def test_exits_are_drawn_by_their_weights() -> None:
    config = dataclasses.replace(CONFIG, exit_weights=(1.0, 3.0, 0.0), same_exit=False)
    drawn = np.bincount(draw_exits(jax.random.key(0), 4000, config), minlength=3) / 4000
    np.testing.assert_allclose(drawn, [0.25, 0.75, 0.0], atol=0.03)
    with pytest.raises(ValueError, match="one for each"):
        draw_exits(jax.random.key(0), 4, dataclasses.replace(CONFIG, exit_weights=(1.0, 1.0)))


def test_a_sampler_gives_its_own_levels_unrounded() -> None:
    schedule = FlowSchedule(steps=4, shift=3.0)
    config = SelfForcingConfig(schedule=schedule)
    np.testing.assert_array_equal(config.sigmas, schedule.sigmas)
    np.testing.assert_array_equal(config.timesteps, schedule.timesteps)


def test_a_sample_that_starts_late_comes_from_the_noised_truth() -> None:
    """Its first steps are thrown away; a start at step 0 is pure noise, whatever the truth."""
    params, noise, renoise, cache = draw()
    truth, exits = normal(5, BLOCKS, *SHAPE), jnp.full(BLOCKS, 1)

    def run(**options):
        return roll_out(predict, params, noise, renoise, exits, STARTS, cache, CONFIG, **options)

    plain, mixed = run(), run(truth=truth, starts=jnp.array([0, 1]))
    np.testing.assert_allclose(mixed.noisy[:, 0], plain.noisy[:, 0], atol=1e-6)
    level = CONFIG.sigmas[1]
    np.testing.assert_allclose(mixed.noisy[:, 1], (1 - level) * truth[:, 1] + level * noise[:, 1], atol=1e-6)
