"""Products of bfloat16 operands against float32: values, gradients, and where they take place."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.models.dit_forward import train_forward
from lavatar_jax.quant import is_quantized
from lavatar_jax.training import precision
from lavatar_jax.training.precision import RoundedWeight, compute_in, operands_product
from lavatar_jax.training.state import split_model
from tests.tiny import normal, random_dit, tiny_config


def rounded(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize("rows", [(4, 6), (6,), (1, 6), (2, 3, 4)])
def test_a_product_and_its_gradients_are_those_of_rounded_operands(rows) -> None:
    x, weight, error = normal(1, *rows, 8), normal(2, 8, 5), normal(3, *rows, 5)
    value, gradient = jax.jit(lambda x, w, e: (lambda y, vjp: (y, vjp(e)))(*jax.vjp(operands_product, x, w)))(
        x, weight, error
    )
    x, weight, error = rounded(x), rounded(weight), rounded(error)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, x @ weight, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient[0], error @ weight.T, rtol=1e-5, atol=1e-5)
    by_weight = x.reshape(-1, 8).T @ error.reshape(-1, 5)
    np.testing.assert_allclose(gradient[1], by_weight, rtol=1e-5, atol=1e-5)


def loss_of(kind: precision.Precision):
    """-> (parameters, loss) of a small transformer on a made-up clip."""
    params, merge = split_model(random_dit(tiny_config(layers=3, inject_layers=(0, 2))))
    merge = compute_in(merge, kind)

    @jax.jit
    def loss(params) -> jax.Array:
        flow = train_forward(
            merge(params),
            normal(1, 2, 6, 4, 4, 3),
            np.full((2, 6), 500.0, np.float32),
            text_BSE=normal(3, 2, 4, 6),
            audio=normal(4, 2, 1, 2, 5, 24),
            ref_B1HWC=normal(2, 2, 1, 4, 4, 3),
        )
        return jnp.mean(jnp.square(flow))

    return params, loss


def test_gradients_with_rounded_operands_are_close_to_those_in_float32(monkeypatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    params, loss = loss_of("float32")
    value, gradient = jax.value_and_grad(loss)(params)
    again, close = jax.value_and_grad(loss_of("operands")[1])(params)
    assert again != value  # something was rounded
    np.testing.assert_allclose(again, value, rtol=1e-2)
    for name, exact in gradient.items():
        assert close[name].dtype == jnp.float32
        difference = float(jnp.linalg.norm(close[name] - exact))
        assert difference <= 0.05 * float(jnp.linalg.norm(exact)) + 1e-6, name


def test_only_large_linear_layers_are_rounded_and_only_where_that_is_fast(monkeypatch) -> None:
    params, _ = split_model(random_dit(tiny_config()))
    seen = {}
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    compute_in(lambda params, frozen=None: seen.update(params), "operands")(params)
    assert {name for name, value in seen.items() if isinstance(value, RoundedWeight)} == {
        name for name in params if is_quantized(name)
    }
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    compute_in(lambda params, frozen=None: seen.update(params), "operands")(params)
    assert not any(isinstance(value, RoundedWeight) for value in seen.values())


@pytest.mark.parametrize(
    ("flags", "expected"), [("fma avx512_bf16 avx2", True), ("amx_bf16", True), ("fma avx2", False)]
)
def test_a_cpu_says_whether_it_multiplies_bfloat16(flags, expected, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert precision.multiplies_bfloat16(tmp_path / "cpuinfo") is expected
    assert precision.multiplies_bfloat16(tmp_path / "none") is False
