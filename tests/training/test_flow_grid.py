"""Self-Forcing's grid of noise levels: rounding to it, and what its ends do."""

import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.training.flow_grid import FlowGrid


def test_the_smallest_level_is_not_zero() -> None:
    assert FlowGrid(shift=5.0).timesteps[-1] == pytest.approx(4.980, abs=1e-3)
    assert FlowGrid(shift=8.0).timesteps[-1] == pytest.approx(7.944, abs=1e-3)
    assert FlowGrid().sigma(0.0) == FlowGrid().sigmas[-1]


def test_a_timestep_is_rounded_to_the_nearest_and_on_ties_to_the_noisier() -> None:
    grid = FlowGrid(shift=1.0)  # timesteps 1000, 999, ..., 1
    np.testing.assert_array_equal(
        grid.nearest(np.array([[1000.0, 998.6], [500.5, 0.0]])), [[0, 1], [499, 999]]
    )


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_conversions_invert_each_other(shape: tuple[int, ...]) -> None:
    rng, grid = np.random.default_rng(0), FlowGrid()
    x0, noise = (jnp.asarray(rng.normal(size=(2, 3, 2, 2, 4)), jnp.float32) for _ in range(2))
    t = rng.uniform(100, 1000, shape)
    x = grid.add_noise(x0, noise, t)
    np.testing.assert_allclose(grid.flow_to_x0(x, noise - x0, t), x0, atol=1e-5)
    np.testing.assert_allclose(grid.x0_to_flow(x, x0, t), noise - x0, atol=1e-4)


def test_steps_are_warped_by_the_grid() -> None:
    grid, steps = FlowGrid(shift=5.0), (1000, 750, 500, 250)
    np.testing.assert_allclose(grid.denoising_steps(steps), [1000, 937.5, 833.3333, 625], rtol=1e-6)
    np.testing.assert_array_equal(grid.denoising_steps(steps, warp=False), steps)


@pytest.mark.parametrize("steps", [(), (500, 750), (1000, 1000), (1001,), (500, 0)])
def test_lists_that_do_not_fall_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must fall within"):
        FlowGrid().denoising_steps(steps)


def test_a_shift_must_be_positive() -> None:
    with pytest.raises(ValueError, match="shift must be positive"):
        FlowGrid(shift=0.0)
