"""What a 16-bit model computes in float32 is float32 on every device, whose default may round products."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.models.attention import Attention
from lavatar_jax.models.audio_encoder import AudioTokens
from lavatar_jax.models.audio_injector import AudioInjector
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.dit_forward import train_forward
from lavatar_jax.models.layers import layer_norm
from tests.tiny import normal, tiny_config

CONFIG = tiny_config(input_skip=True)
PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.* : \((tensor<[^>]+>), (tensor<[^>]+>)\)")


@pytest.fixture(scope="module")
def products() -> list[tuple[str, tuple[str, str]]]:
    """Of a forward with sound: each product as the program says it, and the types of its operands."""
    model = jax.eval_shape(lambda: CausalDiT(CONFIG, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model)
    shapes = {"latent": (1, 3, 8, 8, 3), "t": (1, 3), "text": (1, 4, 6), "audio": (1, 1, 2, 5, 12),
              "ref": (1, 1, 8, 8, 3)}  # fmt: skip
    inputs = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}

    def forward(model: CausalDiT, x: dict[str, jax.Array]) -> jax.Array:
        return train_forward(
            model, x["latent"], x["t"], text_BSE=x["text"], audio=x["audio"], ref_B1HWC=x["ref"]
        )

    with jax.default_matmul_precision("default"):
        text = jax.jit(forward).lower(model, inputs).as_text()
    return [
        (line, match.groups()) for line in text.splitlines() if (match := PRODUCT.search(line)) is not None
    ]


def test_float32_products_are_not_left_to_the_device(products) -> None:
    wide = [line for line, operands in products if any(operand.endswith("xf32>") for operand in operands)]
    # Mix of the speech layers, local_in, global_in, global_out, conv2 and conv3 of both branches.
    heard = 8
    # Two of the embedding and its projection, for the frames and for t = 0; the head and its gain.
    assert len(wide) >= heard + 2 * 3 + 2
    assert {line for line in wide if "HIGHEST" not in line} == set()


def test_16_bit_products_are_left_to_it(products) -> None:
    narrow = [line for line, operands in products if all(operand.endswith("xbf16>") for operand in operands)]
    assert len(narrow) > 10
    assert {line for line in narrow if "HIGHEST" in line} == set()


def test_injectors_modulate_with_the_scale_that_their_layer_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + scale has no place for this one in bfloat16, whose numbers above 1 are 2^-7 apart."""
    queries = []
    monkeypatch.setattr(Attention, "cross", lambda self, x, context: queries.append(x) or x)
    injector = AudioInjector(16, 2, rngs=nnx.Rngs(0))
    shift, scale = np.full(16, 0.5), np.full(16, 0.75 * 2**-7)
    injector.adain.bias = nnx.Param(jnp.concatenate([shift, scale]))  # its weight is zero
    injector = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), injector)
    x = normal(0, 1, 6, 16).astype(jnp.bfloat16)
    injector(x, AudioTokens(normal(1, 1, 1, 3, 5, 16), normal(2, 1, 1, 3, 16)))
    wanted = layer_norm(x, eps=1e-5) * (1 + 0.75 * 2**-7) + 0.5
    np.testing.assert_array_equal(queries[0].reshape(x.shape), wanted.astype(jnp.bfloat16))
