"""The conversion engine on a small model, and the VAE tables on real key lists."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lavatar_jax.checkpoints.convert import ConversionError, Rule, convert, export, param_paths
from lavatar_jax.checkpoints.tables_vae import VAE_RULES, WAN21_RULES
from lavatar_jax.checkpoints.transforms import TRANSFORMS, Transform, flatten_from
from lavatar_jax.config import VAEConfig
from lavatar_jax.errors import UserError
from lavatar_jax.models.vae import make_vae, wan22_config
from tests.shared import shared_path
from tools.parity.vae import load_vae


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (2, 3)))
        self.bias = nnx.Param(jnp.zeros(3))


class Model(nnx.Module):
    def __init__(self) -> None:
        self.stem = Layer(nnx.Rngs(0))
        self.blocks = jax.vmap(lambda key: Layer(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))
        self.heads = nnx.List([Layer(nnx.Rngs(1)), Layer(nnx.Rngs(2))])


RULES = [
    Rule(r"stem\.w", "stem.weight", "linear"),
    Rule(r"stem\.b", "stem.bias", flatten_from(1, -1, 1)),
    Rule(r"layers\.(?P<layer>\d+)\.w", "blocks.weight", "linear"),
    Rule(r"layers\.(?P<layer>\d+)\.b", "blocks.bias"),
    Rule(r"head(?P<n>\d+)\.w", r"heads.\g<n>.weight", "linear"),
    Rule(r"head(\d+)\.b", r"heads.\1.bias"),
    Rule(r"ema\..*", None),
]


def checkpoint() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {"stem.w": rng.normal(size=(3, 2)), "stem.b": rng.normal(size=(1, 3, 1))}
    for prefix, count in [("layers.", 3), ("head", 2)]:
        for index in range(count):
            tensors[f"{prefix}{index}.w"] = rng.normal(size=(3, 2))
            tensors[f"{prefix}{index}.b"] = rng.normal(size=3)
    return {key: value.astype(np.float32) for key, value in tensors.items()}


def problems_of(tensors, rules=RULES) -> str:
    with pytest.raises(ConversionError) as caught:
        convert(tensors, rules, jax.eval_shape(Model))
    assert len(str(caught.value).splitlines()) == 1 + len(caught.value.problems)
    return "\n".join(caught.value.problems)


def test_paths_are_dotted_names() -> None:
    paths = param_paths(Model())
    assert set(paths) == {
        f"{part}.{leaf}" for part in ("stem", "blocks", "heads.0", "heads.1") for leaf in ("weight", "bias")
    }
    assert paths["blocks.weight"].shape == (3, 2, 3)


def test_tensors_arrive_transposed_stacked_and_in_their_places() -> None:
    tensors = checkpoint() | {"ema.whatever": np.zeros(7, np.float32)}
    model = convert(tensors, RULES, jax.eval_shape(Model))
    assert isinstance(model, Model)
    np.testing.assert_array_equal(model.stem.weight[...], tensors["stem.w"].T)
    np.testing.assert_array_equal(model.stem.bias[...], tensors["stem.b"].ravel())
    np.testing.assert_array_equal(model.blocks.weight[2], tensors["layers.2.w"].T)
    np.testing.assert_array_equal(model.blocks.bias[1], tensors["layers.1.b"])
    np.testing.assert_array_equal(model.heads[1].weight[...], tensors["head1.w"].T)


def test_export_is_the_exact_inverse() -> None:
    tensors = checkpoint()
    exported = export(convert(tensors, RULES, jax.eval_shape(Model)), RULES)
    assert exported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(exported[key], tensor, strict=True)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_cast_to_the_models_dtype(dtype) -> None:
    tensors = {key: value.astype(dtype) for key, value in checkpoint().items()}
    model = convert(tensors, RULES, jax.eval_shape(Model))
    assert model.blocks.weight.dtype == jnp.float32
    np.testing.assert_array_equal(model.stem.weight[...], tensors["stem.w"].T.astype(np.float32))
    half = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf.astype(dtype), Model()))
    assert convert(tensors, RULES, half).blocks.weight.dtype == dtype


def test_everything_that_is_wrong_is_listed_at_once() -> None:
    tensors = checkpoint()
    del tensors["layers.1.w"], tensors["head0.b"]
    tensors["stem.w"] = np.zeros((2, 2), np.float32)
    tensors["layers.3.b"] = np.zeros(3, np.float32)
    tensors["head2.w"] = np.zeros((3, 2), np.float32)
    tensors["head1.w"] = np.zeros((3, 2), np.int64)
    tensors["mystery"] = np.zeros(3, np.float32)
    text = problems_of(tensors)
    assert text.count("\n") == 6
    assert "unknown key mystery" in text
    assert "head2.w leads to heads.2.weight, which the model does not have" in text
    assert "heads.0.bias" in text
    assert "blocks.weight has 3 layers: missing [1], surplus []" in text
    assert "blocks.bias has 3 layers: missing [], surplus [3]" in text
    assert "stem.w [2, 2] becomes [2, 2], expected [2, 3]" in text
    assert "head1.w has dtype int64" in text


def test_a_key_of_two_rules_and_a_parameter_of_two_keys_are_errors() -> None:
    assert "stem.w matches 2 rules" in problems_of(checkpoint(), [*RULES, Rule(r"stem\..", "stem.weight")])
    rules = [*RULES, Rule("old_w", "stem.weight", "linear")]
    assert "filled by both stem.w and old_w" in problems_of(
        checkpoint() | {"old_w": np.zeros((3, 2), np.float32)}, rules
    )
    rules = [*RULES, Rule("all_w", "blocks.weight")]
    assert "filled by both" in problems_of(checkpoint() | {"all_w": np.zeros((3, 2, 3), np.float32)}, rules)


def test_a_wrong_rank_is_reported_with_the_key() -> None:
    tensors = checkpoint() | {"stem.w": np.zeros((3, 2, 1), np.float32), "stem.b": np.zeros(3, np.float32)}
    text = problems_of(tensors)
    assert "stem.w [3, 2, 1]:" in text
    assert "stem.b [3]: shape [3] is not of the form [1, -1, 1]" in text


def test_export_names_what_it_cannot_invert() -> None:
    rules = [
        Rule(r"stem\.(w|weight)", "stem.weight"),
        Rule(r"stem\.b", "stem.bias", Transform(np.ravel)),
        *RULES[3:],
    ]
    with pytest.raises(ConversionError) as caught:
        export(Model(), rules)
    assert [problem.split()[-1] for problem in caught.value.problems if problem.startswith("no rule")] == [
        "blocks.weight"
    ]
    assert sum("cannot be inverted" in problem for problem in caught.value.problems) == 2


def test_a_conversion_error_is_a_user_error() -> None:
    assert issubclass(ConversionError, UserError)


@pytest.mark.parametrize(
    ("name", "shape", "ours"),
    [
        ("conv1d", (2, 3, 4), (4, 3, 2)),
        ("conv2d", (2, 3, 4, 5), (4, 5, 3, 2)),
        ("conv3d", (2, 3, 4, 5, 6), (4, 5, 6, 3, 2)),
        ("pointwise2d", (2, 3, 1, 1), (3, 2)),
        ("pointwise3d", (2, 3, 1, 1, 1), (3, 2)),
        ("channels2d", (4, 1, 1), (4,)),
        ("channels3d", (4, 1, 1, 1), (4,)),
        ("drop_first", (1, 6, 4), (6, 4)),
    ],
)
def test_transforms_and_their_inverses(name, shape, ours) -> None:
    tensor = np.random.default_rng(0).normal(size=shape)
    transform = TRANSFORMS[name]
    assert transform.forward(tensor).shape == ours
    assert transform.inverse is not None
    np.testing.assert_array_equal(transform.inverse(transform.forward(tensor)), tensor, strict=True)


@pytest.mark.parametrize(
    ("name", "shape"), [("pointwise2d", (2, 3, 3, 3)), ("channels3d", (4, 2, 1, 1)), ("drop_first", (2, 6))]
)
def test_transforms_refuse_to_drop_numbers(name, shape) -> None:
    with pytest.raises(ValueError, match="shape"):
        TRANSFORMS[name].forward(np.zeros(shape))


# The VAE tables


def test_every_key_of_the_wan21_checkpoint_finds_its_place() -> None:
    manifest = json.loads(shared_path("manifests/wan21_vae.json").read_text())
    assert len(manifest) == 194
    tensors = {key: np.broadcast_to(ml_dtypes.bfloat16(0), shape) for key, (shape, _) in manifest.items()}
    model = jax.eval_shape(
        lambda: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_vae(VAEConfig(), rngs=nnx.Rngs(0)))
    )
    assert len(jax.tree.leaves(convert(tensors, WAN21_RULES, model))) == 194


def test_the_wan21_reference_weights_survive_a_round_trip() -> None:
    case = shared_path("golden/09_wan21_vae")
    tensors = load_file(case / "weights.safetensors")
    exported = export(load_vae(case), WAN21_RULES)
    assert exported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(exported[key], tensor, strict=True)


def test_wan22_keys_have_the_published_form() -> None:
    """Levels hold their blocks; widths as published, at a tenth of the size."""
    published = wan22_config()
    config = VAEConfig(
        kind="wan22",
        width=published.width // 10,
        decoder_width=24,
        multipliers=published.multipliers,
        latent_channels=4,
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
        patch=2,
    )
    abstract = jax.eval_shape(lambda: make_vae(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)
    tensors = export(model, VAE_RULES["wan22"])
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    expected = {
        "encoder.conv1.weight": (16, 12, 3, 3, 3),
        "encoder.downsamples.0.downsamples.0.residual.0.gamma": (16, 1, 1, 1),
        "encoder.downsamples.0.downsamples.2.resample.1.weight": (16, 16, 3, 3),
        "encoder.downsamples.1.downsamples.0.shortcut.weight": (32, 16, 1, 1, 1),
        "encoder.downsamples.1.downsamples.2.time_conv.weight": (32, 32, 3, 1, 1),
        "encoder.downsamples.3.downsamples.1.residual.6.bias": (64,),
        "encoder.middle.1.to_qkv.weight": (192, 64, 1, 1),
        "encoder.head.2.weight": (8, 64, 3, 3, 3),
        "conv1.weight": (8, 8, 1, 1, 1),
        "conv2.weight": (4, 4, 1, 1, 1),
        "decoder.upsamples.0.upsamples.3.time_conv.weight": (192, 96, 3, 1, 1),
        "decoder.upsamples.0.upsamples.3.resample.1.weight": (96, 96, 3, 3),
        "decoder.upsamples.2.upsamples.0.residual.2.weight": (48, 96, 3, 3, 3),
        "decoder.upsamples.3.upsamples.2.residual.6.weight": (24, 24, 3, 3, 3),
        "decoder.middle.1.norm.gamma": (96, 1, 1),
        "decoder.head.2.weight": (12, 24, 3, 3, 3),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    assert not any(
        key.startswith(("encoder.downsamples.3.downsamples.2", "decoder.upsamples.3.upsamples.3"))
        for key in shapes
    )
    back = convert(tensors, VAE_RULES["wan22"], abstract)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(got, want)
