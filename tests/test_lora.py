"""Adapters: where the release has them, no effect before training, the recorded merge, their gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lavatar_jax.checkpoints.convert import convert, export, param_paths
from lavatar_jax.checkpoints.lora_keys import merged, read_lora
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.config import DiTConfig
from lavatar_jax.lora import AdaptedWeight, add_adapters, join_adapters, merge, split_adapters
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.dit_forward import train_forward
from lavatar_jax.models.layers import Linear
from lavatar_jax.quant import quantize
from tests.shared import golden, shared_path
from tests.tiny import normal, random_dit, tiny_config
from tools.parity.case import dit_config

CONFIG = tiny_config(layers=3, inject_layers=(0, 2))
LATENT, REFERENCE = normal(1, 1, 3, 4, 4, 3), normal(2, 1, 1, 4, 4, 3)
TIMES = np.linspace(100, 900, 3, dtype=np.float32)[None]
TEXT, AUDIO = normal(3, 1, 4, 6), normal(4, 1, 1, 2, 5, 12)


@jax.jit
def forward(model: CausalDiT) -> jax.Array:
    return train_forward(model, LATENT, TIMES, text_BSE=TEXT, audio=AUDIO, ref_B1HWC=REFERENCE)


def with_adapters(model: CausalDiT, **options) -> CausalDiT:
    """Adapters that do something, as after training."""
    adapters, rest = split_adapters(add_adapters(model, jax.random.key(0), rank=2, alpha=3.0, **options))
    trained = {name: 0.3 * normal(seed, *x.shape) for seed, (name, x) in enumerate(adapters.items())}
    return join_adapters(trained, rest)


def relative(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_the_published_model_has_as_many_adapters_as_the_published_file() -> None:
    """448 modules of rank 128 at 14B, by shapes alone."""
    entries = json.loads(shared_path("manifests/liveavatar_lora.json").read_text())
    model = jax.eval_shape(lambda: CausalDiT(DiTConfig(), rngs=nnx.Rngs(0)))
    adapted = jax.eval_shape(lambda model: add_adapters(model, jax.random.key(0)), model)
    adapters, _ = split_adapters(adapted)
    assert sum(leaf.shape[0] for name, leaf in adapters.items() if name.endswith(".a")) == 448
    assert sum(leaf.size for leaf in adapters.values()) == 676_331_520
    assert sum(int(np.prod(shape)) for shape, _ in entries.values()) == 676_331_520
    weights = [leaf for leaf in jax.tree.leaves(adapted, is_leaf=_adapted) if _adapted(leaf)]
    assert {weight.scale for weight in weights} == {0.5}
    assert len(weights) == 14


def _adapted(node) -> bool:
    return isinstance(node, AdaptedWeight)


def test_new_adapters_change_nothing_and_trained_ones_what_their_merge_changes() -> None:
    model = random_dit(CONFIG)
    want = forward(model)
    new = add_adapters(model, jax.random.key(1), rank=2)
    np.testing.assert_allclose(forward(new), want, rtol=1e-6, atol=1e-6)
    adapters, _ = split_adapters(new)
    assert all(bool((leaf == 0).all()) == name.endswith(".b") for name, leaf in adapters.items())
    bound = float(jnp.abs(adapters["blocks.ffn.outer.weight.a"]).max())
    assert 0.8 < bound * np.sqrt(CONFIG.ffn_width) <= 1

    trained = with_adapters(model)
    assert relative(forward(trained), want) > 0.1
    np.testing.assert_allclose(forward(merge(trained)), forward(trained), rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(merge(trained)) == jax.tree.structure(model)


def test_the_recorded_merge_through_the_model() -> None:
    """The recorded adapters as A and B of the stacked layers, merged there, exported to PyTorch's names."""
    info, inputs, want = golden("13_lora_merge")
    weights = load_file(shared_path("golden/13_lora_merge/weights.safetensors"))
    config = dit_config(info["config"])
    model = convert(weights, DIT_RULES, jax.eval_shape(lambda: CausalDiT(config, rngs=nnx.Rngs(0))))
    adapted = add_adapters(model, jax.random.key(0), rank=info["rank"], alpha=info["alpha"])
    adapters, rest = split_adapters(adapted)
    filled = {}
    for name, leaf in adapters.items():
        module, side = name.removesuffix(f".weight.{name[-1]}"), name[-1].upper()
        for ours, theirs in (("ffn.inner", "ffn.0"), ("ffn.outer", "ffn.2")):
            module = module.replace(ours, theirs)
        module = module.replace("injectors.attention", "audio_injector.injector.#")
        module = module if "#" in module else module.replace("blocks.", "blocks.#.")
        keys = [f"{module.replace('#', str(n))}.lora_{side}.default.weight" for n in range(leaf.shape[0])]
        filled[name] = jnp.stack([inputs[key].T for key in keys])
        assert filled[name].shape == leaf.shape
    assert sum(leaf.shape[0] for leaf in filled.values()) == len(inputs)
    exported = export(merge(join_adapters(filled, rest)), DIT_RULES)
    for key, tensor in want.items():
        np.testing.assert_allclose(exported[key], tensor, rtol=1e-5, atol=1e-6, err_msg=key)
    pairs = read_lora(inputs)
    for key, tensor in exported.items():
        pair = pairs.get(key.removesuffix(".weight"))
        expected = weights[key] if pair is None else merged(weights[key], pair)
        np.testing.assert_allclose(tensor, expected, rtol=1e-5, atol=1e-6, err_msg=key)


def test_a_merge_is_rounded_once_to_the_dtype_of_the_base() -> None:
    base = normal(0, 2, 8, 4).astype(jnp.bfloat16)
    weight = AdaptedWeight(base, 1e-2 * normal(1, 2, 8, 3), normal(2, 2, 3, 4), 0.25)
    got = weight.merge()
    assert got.dtype == jnp.bfloat16
    a, b = (np.asarray(x, np.float64) for x in (weight.a, weight.b))
    exact = np.asarray(base, np.float64) + 0.25 * np.einsum("lir,lro->lio", a, b)
    np.testing.assert_array_equal(got, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))


def test_the_optimizer_sees_adapters_only_and_the_base_stays() -> None:
    model = add_adapters(random_dit(CONFIG), jax.random.key(2), rank=2)
    adapters, rest = split_adapters(model)
    assert set(adapters) == {name for name in param_paths(model) if name.endswith((".a", ".b"))}
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(adapters, rest, state):
        def loss(adapters):
            return jnp.mean(jnp.square(forward(join_adapters(adapters, rest)) - LATENT))

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    state = optimizer.init(adapters)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert moments <= 2 * sum(leaf.size for leaf in adapters.values()) + 1
    losses = []
    for _ in range(5):
        adapters, state, value = step(adapters, rest, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert all(float(jnp.abs(leaf).max()) > 0 for name, leaf in adapters.items() if name.endswith(".b"))
    after = join_adapters(adapters, rest)
    before = dict(param_paths(random_dit(CONFIG)))
    for name, leaf in param_paths(after).items():
        if name not in adapters:
            np.testing.assert_array_equal(leaf, before[name.removesuffix(".base")])


def test_adapters_on_quantised_weights() -> None:
    """The order does not matter; a merge must come before the rounding."""
    model = random_dit(CONFIG)
    above, below = with_adapters(quantize(model)), quantize(with_adapters(model))
    assert jax.tree.structure(above) == jax.tree.structure(below)
    np.testing.assert_array_equal(forward(above), forward(below))
    assert relative(forward(above), forward(with_adapters(model))) < 0.15
    with pytest.raises(ValueError, match="merge first, then quantise"):
        merge(above)


def test_adapters_compute_in_the_models_dtype() -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_dit(CONFIG))
    adapted = with_adapters(half)
    layer = jax.tree.map(lambda leaf: leaf[0], adapted.blocks)
    assert layer.ffn.inner(normal(0, 2, 16)).dtype == jnp.bfloat16
    assert layer.ffn.inner.weight.get_value().a.dtype == jnp.float32
    assert relative(forward(adapted), forward(with_adapters(random_dit(CONFIG)))) < 0.1


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no weight that matches"):
        add_adapters(Linear(2, 2, rngs=nnx.Rngs(0)), jax.random.key(0))
    once = add_adapters(random_dit(CONFIG), jax.random.key(0), rank=1)
    with pytest.raises(ValueError, match=r"blocks\.\S+ has an adapter already"):
        add_adapters(once, jax.random.key(0), rank=1)
    _, rest = split_adapters(once)
    with pytest.raises(KeyError, match=r"blocks\.cross_attn\.k\.weight\.a"):
        join_adapters({}, rest)
    only_queries = add_adapters(
        random_dit(CONFIG), jax.random.key(0), rank=1, targets=r"blocks\..*\.q\.weight"
    )
    assert len(split_adapters(only_queries)[0]) == 4
