"""8-bit layers: the recorded codes exactly, the reference's list of layers, and whole forwards with them."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.config import DiTConfig
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.dit_forward import train_forward
from lavatar_jax.models.layers import Linear
from lavatar_jax.quant import E4M3, is_quantized, quantize, quantize_weight, round_to_e4m3
from tests.shared import golden, shared_path
from tests.tiny import normal, random_dit, tiny_config

CONFIG = tiny_config(layers=3, inject_layers=(0, 2))
LATENT, REFERENCE = normal(1, 1, 3, 4, 4, 3), normal(2, 1, 1, 4, 4, 3)
TIMES = np.linspace(100, 900, 3, dtype=np.float32)[None]
TEXT, AUDIO = normal(3, 1, 4, 6), normal(4, 1, 1, 2, 5, 12)


@jax.jit
def forward(model: CausalDiT) -> jax.Array:
    return train_forward(model, LATENT, TIMES, text_BSE=TEXT, audio=AUDIO, ref_B1HWC=REFERENCE)


def linear(weight: jax.Array, bias: jax.Array) -> Linear:
    layer = Linear(*weight.shape, rngs=nnx.Rngs(0))
    structure = jax.tree.structure(layer)
    by_path = {"weight": weight, "bias": bias}
    return jax.tree.unflatten(structure, [by_path[path] for path in param_paths(layer)])


def with_quantized_weight(layer: Linear, **options) -> Linear:
    def convert(path, leaf):
        return quantize_weight(leaf, **options) if path[0].name == "weight" else leaf

    return jax.tree_util.tree_map_with_path(convert, layer)


def relative(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", ["x_normal", "x_small", "x_outlier"])
@pytest.mark.parametrize("compiled", [False, True])
def test_codes_and_scales_of_the_recorded_case_are_exact(name: str, compiled: bool) -> None:
    _, inputs, want = golden("14_fp8_linear")
    x = jnp.asarray(inputs[name], jnp.bfloat16)
    rounded = jax.jit(round_to_e4m3) if compiled else round_to_e4m3
    codes, inverse_scale = rounded(x, jnp.max(jnp.abs(x)))
    assert codes.dtype == E4M3
    np.testing.assert_array_equal(codes.astype(jnp.float32), want[f"{name}_q"])
    np.testing.assert_array_equal(inverse_scale, want[f"{name}_inv_scale"][0])


def test_a_quantised_linear_layer_is_the_recorded_one() -> None:
    info, inputs, want = golden("14_fp8_linear")
    weights = load_file(shared_path("golden/14_fp8_linear/weights.safetensors"))
    layer = linear(*(jnp.asarray(x, jnp.bfloat16) for x in (weights["weight"].T, weights["bias"])))
    layer = with_quantized_weight(layer)
    weight = layer.weight.get_value()
    np.testing.assert_array_equal(weight.values.astype(jnp.float32), want["weight_q"].T)
    np.testing.assert_array_equal(weight.inverse_scale, want["weight_inv_scale"][None])
    tolerance = info["tolerance"]
    for name in ("x_normal", "x_small", "x_outlier"):
        x = jnp.asarray(inputs[name], jnp.bfloat16)
        y = layer(x)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            y.astype(jnp.float32), want[f"{name}_y_bf16"], **info["tolerance"]["y_bf16"]
        )
        emulated = x @ weight + weights["bias"]
        np.testing.assert_allclose(emulated, want[f"{name}_y_emulated_fp32"], **tolerance["y_emulated_fp32"])


def test_a_float32_layer_computes_in_float32() -> None:
    _, inputs, want = golden("14_fp8_linear")
    weights = load_file(shared_path("golden/14_fp8_linear/weights.safetensors"))
    layer = with_quantized_weight(linear(jnp.asarray(weights["weight"].T), jnp.asarray(weights["bias"])))
    y = layer(jnp.asarray(inputs["x_normal"]))
    assert y.dtype == jnp.float32
    # The recorded product was rounded to bfloat16 on the way to 8 bits, this one was not.
    assert 1e-3 < relative(y, want["x_normal_y_emulated_fp32"]) < 0.04
    assert relative(y, want["x_normal_y_bf16_unquantized"]) > 0.01


def test_exactly_the_layers_of_the_reference_are_quantised() -> None:
    """By PyTorch names: the recorded lists of replaced and kept layers of the tiny model."""
    info = json.loads(shared_path("golden/14_fp8_linear/case.json").read_text())
    # The head's gain exists in small models only, that of the recording is not one.
    linears = [r for r in DIT_RULES if r.transform == "linear" and r.path != "head.gain.weight"]
    paths = param_paths(jax.eval_shape(lambda: quantize(CausalDiT(CONFIG, rngs=nnx.Rngs(0)))))

    def ours(module: str) -> str:
        (path,) = (m.expand(r.path) for r in linears if (m := re.fullmatch(r.pattern, f"{module}.weight")))
        return path

    replaced, kept = ({ours(name) for name in info[f"{kind}_linears"]} for kind in ("replaced", "kept"))
    quantized = {path.removesuffix(".values") for path in paths if path.endswith(".values")}
    assert quantized == replaced
    assert {path for path in paths if is_quantized(path.removesuffix(".values"))} == {
        f"{path}.values" for path in replaced
    }
    assert kept <= paths.keys()
    assert replaced | kept == {rule.path for rule in linears}


def test_stacked_layers_have_a_scale_each() -> None:
    """The reference's tensors are single layers; here they are stacked, one of them with an outlier."""
    weight = normal(0, 3, 8, 4).at[1, 2, 3].set(900.0)
    stacked = quantize_weight(weight)
    assert stacked.inverse_scale.shape == (3, 1, 1)
    for index, layer in enumerate(weight):
        alone = quantize_weight(layer)
        np.testing.assert_array_equal(stacked.values[index], alone.values)
        np.testing.assert_array_equal(stacked.inverse_scale[index], alone.inverse_scale)
    np.testing.assert_allclose(stacked.dequantize(), weight, rtol=2**-4, atol=2**-8)
    assert stacked.inverse_scale[0, 0, 0] != stacked.inverse_scale[1, 0, 0]
    assert stacked.inverse_scale[1, 0, 0] == np.float32(900 / 448)


def test_weights_below_one_are_multiplied_by_448_or_by_what_each_channel_allows() -> None:
    weight = normal(0, 64, 5) * jnp.asarray([1e-1, 1e-2, 1e-4, 1e-6, 0])
    capped, per_channel = quantize_weight(weight), quantize_weight(weight, per_channel=True)
    assert float(capped.inverse_scale[0, 0]) == np.float32(1 / 448)
    assert per_channel.inverse_scale.shape == (1, 5)
    error = jnp.abs(per_channel.dequantize() - weight).max(axis=0)
    assert bool((error <= jnp.abs(weight).max(axis=0) * 2**-4).all())
    # What is far below 2^-9 / 448 = 4e-6 vanishes under the reference's rule.
    vanished = (capped.dequantize() == 0).mean(axis=0)
    assert vanished[0] < 0.1
    assert vanished[3] > 0.9
    assert (per_channel.dequantize()[:, 3] == 0).mean() < 0.1


def test_one_outlier_among_the_tokens_costs_all_of_them() -> None:
    """The scale of activations is one number per call, as in the reference."""
    weight, x = quantize_weight(normal(0, 16, 4)), normal(1, 2, 3, 16)
    alone = (x[:1] @ weight)[0]
    np.testing.assert_array_equal(alone, x[0] @ weight)
    beside_an_outlier = (x.at[1, 0, 0].set(1e6) @ weight)[0]
    assert relative(beside_an_outlier, alone) > 0.1


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 0.1), (jnp.bfloat16, 0.12)])
def test_the_transformer_runs_and_stays_near(per_channel: bool, dtype, bound: float) -> None:
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), random_dit(CONFIG))
    quantized = quantize(model, per_channel=per_channel)
    assert quantized.dtype == dtype
    want, got = forward(random_dit(CONFIG)), forward(quantized)
    assert 1e-3 < relative(got, want) < bound
    layer = jax.tree.map(lambda leaf: leaf[1], quantized.blocks)
    assert layer.self_attn.q(normal(0, 2, 16)).dtype == dtype
    # Shapes alone, and over stacked layers at once.
    assert jax.eval_shape(forward, quantized).shape == LATENT.shape
    keys = quantized.text_keys_values(TEXT)
    np.testing.assert_array_equal(keys.k[1], layer.cross_attn.keys_values(quantized.embed_text(TEXT)).k)


def test_all_quantised_layers_take_part() -> None:
    """Other codes in any one of them change the result."""
    quantized = quantize(random_dit(CONFIG))
    want, structure = np.asarray(forward(quantized)), jax.tree.structure(quantized)
    leaves = jax.tree.leaves(quantized)
    places = [index for index, leaf in enumerate(leaves) if leaf.dtype == E4M3]
    assert len(places) == 15
    for index in places:
        changed = [*leaves[:index], -leaves[index], *leaves[index + 1 :]]
        assert relative(forward(jax.tree.unflatten(structure, changed)), want) > 1e-4, index


def test_gpus_are_given_a_product_of_8_bit_operands() -> None:
    """In the program for CUDA both operands of the product are e4m3, and the scales come behind it."""
    weight = jax.eval_shape(lambda: quantize_weight(jnp.zeros((32, 16))))
    x = jax.ShapeDtypeStruct((2, 5, 32), jnp.bfloat16)
    text = jax.jit(lambda x, w: x @ w).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    (product,) = re.findall(r"stablehlo\.dot_general.*", text)
    assert re.search(r"\(tensor<10x32xf8E4M3FN>, tensor<32x16xf8E4M3FN>\) -> tensor<10x16xf32>", product)


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no linear layer"):
        quantize(Linear(2, 2, rngs=nnx.Rngs(0)))
    once = jax.eval_shape(lambda: quantize(CausalDiT(CONFIG, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match="CausalDiT has no linear layer"):
        jax.eval_shape(quantize, once)


def test_the_published_model_halves() -> None:
    """At 14B, by shapes alone."""
    model = jax.eval_shape(lambda: CausalDiT(DiTConfig(), rngs=nnx.Rngs(0)))
    quantized = param_paths(jax.eval_shape(quantize, model))
    eight = sum(leaf.size for leaf in quantized.values() if leaf.dtype == E4M3)
    scales = sum(leaf.size for path, leaf in quantized.items() if path.endswith("inverse_scale"))
    assert scales == 40 * 10 + 12 * 5
    assert eight == 40 * (8 * 5120**2 + 2 * 5120 * 13824) + 12 * 6 * 5120**2
    assert eight / sum(leaf.size for leaf in quantized.values()) > 0.9
