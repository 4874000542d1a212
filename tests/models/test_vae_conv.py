"""Causal convolution: against its definition, its two implementations, whole against chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.models.vae import conv
from lavatar_jax.parallel import MeshConfig, sharded_training, train_mesh


def causal_conv_by_definition(x: np.ndarray, weight: np.ndarray, time_stride: int) -> np.ndarray:
    """Sum over taps of zero-padded shifts: kt - stride zero frames in front, same padding in space."""
    kt, kh, kw, _, n_out = weight.shape
    padding = ((0, 0), (kt - time_stride, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0))
    padded = np.pad(x.astype(np.float64), padding)
    height, width = x.shape[2:4]
    frames = x.shape[1] // time_stride
    y = np.zeros((x.shape[0], frames, height, width, n_out))
    for t in range(kt):
        for i in range(kh):
            for j in range(kw):
                window = padded[:, t::time_stride, i : i + height, j : j + width]
                y += window[:, :frames] @ weight[t, i, j]
    return y


def make(kernel: tuple[int, int, int], time_stride: int) -> tuple[conv.CausalConv3d, jax.Array]:
    layer = conv.CausalConv3d(3, 5, kernel, time_stride=time_stride, rngs=nnx.Rngs(0))
    return layer, jax.random.normal(jax.random.key(1), (2, 6, 4, 5, 3))


KERNELS = pytest.mark.parametrize(
    ("kernel", "time_stride"), [((3, 3, 3), 1), ((3, 1, 1), 1), ((3, 1, 1), 2), ((1, 1, 1), 1)]
)


@KERNELS
@pytest.mark.parametrize("implementation", ["taps", "plain"])
def test_agrees_with_the_definition(kernel, time_stride, implementation, monkeypatch) -> None:
    monkeypatch.setattr(conv, "IMPLEMENTATION", implementation)
    layer, x = make(kernel, time_stride)
    want = causal_conv_by_definition(np.asarray(x), np.asarray(layer.weight[...]), time_stride)
    np.testing.assert_allclose(layer(x)[0], want, rtol=1e-5, atol=1e-5)


@KERNELS
def test_both_implementations_have_equal_gradients(kernel, time_stride) -> None:
    layer, x = make(kernel, time_stride)

    def loss(x, weight, implementation):
        return jnp.sum(
            jnp.sin(conv.time_conv3d(x, weight, time_stride=time_stride, implementation=implementation))
        )

    taps, plain = (jax.grad(loss, (0, 1))(x, layer.weight[...], name) for name in ("taps", "plain"))
    for got, want in zip(taps, plain, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("at_once", [1, 40, 1000])  # positions: one frame, two, all five at once
def test_gradients_of_frames_equal_those_of_xla(at_once, dtype, monkeypatch) -> None:
    monkeypatch.setattr(conv, "AT_ONCE", at_once)
    graph, state = nnx.split(conv.FrameConv2d(3, 7, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (1, 5, 4, 5, 3))
    state, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (state, x))

    def gradients(implementation):
        monkeypatch.setattr(conv, "IMPLEMENTATION", implementation)
        loss = jax.grad(lambda x, state: jnp.sum(jnp.sin(nnx.merge(graph, state)(x))), (0, 1))
        return jax.tree.leaves(loss(x, state))

    fast, xla = gradients("taps"), gradients("plain")
    assert len(fast) == 3  # of x, weight and bias
    for got, want in zip(fast, xla, strict=True):
        assert got.dtype == dtype
        got, want = (np.asarray(value, np.float32) for value in (got, want))
        rounding = 1e-4 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(got, want, rtol=rounding, atol=rounding * np.abs(want).max())


@KERNELS
def test_chunks_with_history_equal_the_whole(kernel, time_stride) -> None:
    layer, x = make(kernel, time_stride)
    whole, last_history = layer(x)
    history = None
    parts = []
    for chunk in jnp.split(x, [2, 2, 4], axis=1):  # the second chunk is empty
        part, history = layer(chunk, history)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(history, last_history)


@pytest.mark.parametrize("devices", [1, 2])
def test_frames_of_several_devices_are_not_brought_together(devices) -> None:
    """The fast gradient goes through all frames in a loop; where they are split XLA's own is taken."""
    layer, x = make((3, 3, 3), 1)
    frames = conv.FrameConv2d(5, 5, rngs=nnx.Rngs(0))
    mesh = train_mesh(MeshConfig(data=devices))
    with sharded_training(mesh):
        jaxpr = jax.make_jaxpr(jax.grad(lambda layer, frames: jnp.sum(frames(layer(x)[0])), (0, 1)))(
            layer, frames
        )
    assert str(jaxpr).count("scan[") == (2 if devices == 1 else 0)


def test_the_default_follows_the_backend(monkeypatch) -> None:
    used = []
    monkeypatch.setattr(conv, "conv2d", lambda x, weight, *, padding: used.append(weight.shape) or x)
    _, x = make((1, 1, 1), 1)
    weight = jnp.zeros((1, 1, 1, 3, 3))
    conv.time_conv3d(x, weight)
    assert used == [(1, 1, 3, 3)]  # the tests run on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    conv.time_conv3d(x, weight)
    assert len(used) == 1
