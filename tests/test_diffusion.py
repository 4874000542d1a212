"""The sampler's noise levels against the reference's scheduler, and the algebra of the path."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax import diffusion
from lavatar_jax.diffusion import FlowSchedule
from tests.shared import golden


@pytest.mark.parametrize("combo", range(3))
def test_golden_schedule_and_steps(combo: int) -> None:
    case, inputs, outputs = golden("08c_euler_scheduler")
    steps, shift = case["combos"][combo]
    schedule = FlowSchedule(steps=steps, shift=shift)
    np.testing.assert_allclose(schedule.sigmas, outputs[f"sigmas_{combo}"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(schedule.timesteps, outputs[f"timesteps_{combo}"], rtol=1e-6, atol=1e-6)
    x = jnp.asarray(inputs["x"])
    for i in range(steps):
        x = diffusion.euler_step(x, jnp.asarray(inputs[f"v{i}"]), schedule.sigmas[i], schedule.sigmas[i + 1])
    np.testing.assert_allclose(x, outputs[f"x_{combo}_final"], rtol=1e-6, atol=1e-6)


def test_release_schedule_has_the_published_timesteps() -> None:
    timesteps = FlowSchedule(steps=4, shift=3.0).timesteps
    np.testing.assert_allclose(timesteps, [1000, 857.6923, 602.1506, 8.9286], atol=1e-4, rtol=0)


def test_single_shift_is_self_forcings_list() -> None:
    schedule = FlowSchedule(steps=4, shift=5.0, doubly_shifted=False)
    np.testing.assert_allclose(schedule.timesteps, [1000, 937.5, 833.3333, 625], rtol=1e-6)
    assert schedule.sigmas[-1] == 0


@hypothesis.given(steps=st.integers(1, 200), shift=st.floats(1.0, 12.0), doubly_shifted=st.booleans())
def test_levels_fall_strictly_from_one_to_zero(steps: int, shift: float, doubly_shifted: bool) -> None:
    sigmas = FlowSchedule(steps=steps, shift=shift, doubly_shifted=doubly_shifted).sigmas
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == np.float32
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"shift": 0.0}, {"shift": float("nan")}])
def test_impossible_schedules_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"step|shift"):
        FlowSchedule(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_conversions_invert_each_other_at_any_level(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x0, noise = (jnp.asarray(rng.normal(size=(2, 3, 4, 4, 5)), jnp.float32) for _ in range(2))
    sigma = jnp.asarray(rng.uniform(0.1, 1.0, shape), jnp.float32)
    x, v = diffusion.add_noise(x0, noise, sigma), diffusion.velocity(x0, noise)
    np.testing.assert_allclose(diffusion.v_to_x0(x, v, sigma), x0, atol=1e-5)
    np.testing.assert_allclose(diffusion.x0_to_v(x, x0, sigma), v, atol=3e-5)
    # The true velocity is constant on the path: one Euler step lands on any other level exactly.
    half = diffusion.add_noise(x0, noise, sigma / 2)
    np.testing.assert_allclose(diffusion.euler_step(x, v, sigma, sigma / 2), half, atol=1e-5)


def test_levels_belong_to_leading_axes() -> None:
    x0, noise = jnp.zeros((2, 3, 2, 2, 1)), jnp.ones((2, 3, 2, 2, 1))
    sigma = jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 6
    x = diffusion.add_noise(x0, noise, sigma)
    np.testing.assert_array_equal(x[:, :, 0, 0, 0], sigma)


def test_half_precision_latents_step_in_float32() -> None:
    x, v = jnp.full((1, 8), 1.0, jnp.bfloat16), jnp.full((1, 8), 2.0, jnp.bfloat16)
    y = diffusion.euler_step(x, v, 0.6021506, 0.0089286)
    assert y.dtype == jnp.bfloat16
    in_float32 = float(jnp.asarray(1 + (0.0089286 - 0.6021506) * 2, jnp.bfloat16))
    assert float(y[0, 0]) == in_float32 != float(1 + jnp.bfloat16(0.0089286 - 0.6021506) * jnp.bfloat16(2))
