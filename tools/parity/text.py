"""Case 10: the umT5 text encoder."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from lavatar_jax.checkpoints.convert import convert
from lavatar_jax.checkpoints.tables_umt5 import UMT5_RULES
from lavatar_jax.models.umt5 import UMT5Config, UMT5Encoder, position_bias
from tools.parity.case import Case, Check


def load_umt5(case: Case) -> UMT5Encoder:
    """The case's encoder, through the converter."""
    sizes = case["config"]
    config = UMT5Config(
        vocabulary=sizes["vocab"],
        width=sizes["dim"],
        attention_width=sizes["dim_attn"],
        ffn_width=sizes["dim_ffn"],
        layers=sizes["num_layers"],
        heads=sizes["num_heads"],
        buckets=sizes["num_buckets"],
    )
    return convert(case.weights, UMT5_RULES, jax.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0))))


def umt5(case: Case) -> Iterator[Check]:
    want, tolerance = dict(case.outputs())[""], case.tolerance("float32")
    encoder = load_umt5(case)
    ids, mask = jnp.asarray(case.inputs["ids"], jnp.int32), jnp.asarray(case.inputs["mask"] != 0)
    # The case keeps the first queries' rows of the first layer's bias.
    queries, keys = want["pos_bias_layer0"].shape[-2:]
    table = encoder.blocks.attention.position_bias[0]
    bias = position_bias(table, encoder.config.max_distance, keys)[None, :, :queries]
    yield Check("out", jax.jit(UMT5Encoder.__call__)(encoder, ids, mask), want["out"], tolerance)
    yield Check("pos_bias_layer0", bias, want["pos_bias_layer0"], tolerance)
