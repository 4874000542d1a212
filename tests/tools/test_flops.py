"""Arithmetic worked out from a configuration, against the traced model and the reference's table."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.config import DiTConfig, SamplingConfig
from lavatar_jax.evaluation.flops import StreamShape, count_flops, layer_parameters, other_parameters
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.quant import quantize
from tests.shared import shared_path
from tools.bench_step import random_model, step_arguments, step_function

SUMMARY = "manifests/summary.json"
PARTS = {
    "self-attention, linear": "self_attn_linear_TFLOP",
    "self-attention": "self_attn_sdpa_TFLOP",
    "cross-attention, linear": "cross_attn_linear_TFLOP",
    "cross-attention": "cross_attn_sdpa_TFLOP",
    "feed-forward": "ffn_TFLOP",
    "audio injectors": "audio_injector_TFLOP",
    "audio encoder": "audio_encoder_TFLOP",
}


def test_counts_products_convolutions_and_loops() -> None:
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 4))

    def function(a, b):
        x, _ = jax.lax.scan(lambda x, _: (jax.jit(jnp.dot)(x, b), None), a, None, length=7)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ b @ b, lambda x: x, x)

    assert count_flops(function, a, b) == (7 + 2) * 2 * 3 * 4 * 4
    image, kernel = jnp.zeros((1, 8, 5)), jnp.zeros((3, 5, 6))

    def convolution(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    assert count_flops(convolution, image, kernel) == 2 * 3 * 6 * 3 * 5


@pytest.mark.parametrize(("height", "width"), [(90, 50), (88, 48), (60, 104), (56, 104), (64, 64)])
def test_the_table_of_the_reference(height: int, width: int) -> None:
    table = json.loads(shared_path(SUMMARY).read_text())["flops_per_3_latent_frame_block"]
    [row] = [row for key, row in table.items() if f"latent {height}x{width}" in key]
    shape = StreamShape(config=DiTConfig(), height=height, width=width)
    assert shape.queries == row["query_tokens"]
    assert shape.sink == row["cond_tokens"]
    assert shape.keys == row["kv_tokens_full"]
    flops = shape.flops(text_cached=False, audio_copies=73)
    for part, name in PARTS.items():
        assert flops[part] / 1e12 == pytest.approx(row[name], rel=1e-3, abs=6e-5), part
    assert sum(flops.values()) / 1e12 == pytest.approx(row["total_TFLOP_per_forward"], rel=2e-4)
    sink_keys = DiTConfig().layers * DiTConfig().width * 2 * shape.sink
    recorded = 40 * (row["kv_cache_bytes_per_layer_bf16 (k+v, 12 latent frames)"])
    recorded += 40 * row["cond_cache_bytes_per_layer_bf16_used"]
    assert shape.ring_bytes() - sink_keys == pytest.approx(recorded, rel=1e-6)
    cached = shape.flops(audio_copies=73)
    saved = flops["cross-attention, linear"] - cached["cross-attention, linear"]
    assert saved / 1e12 == pytest.approx(
        row["cross_attn_text_kv_TFLOP (cacheable, reference recomputes)"], rel=1e-3
    )


def test_parameters_of_the_published_model() -> None:
    recorded = json.loads(shared_path(SUMMARY).read_text())
    counted = layer_parameters(DiTConfig())
    parts = recorded["dit_params_by_component"]
    blocks = sum(parts[f"blocks.{part}"] for part in ("self_attn", "cross_attn", "ffn"))
    assert counted["blocks"] == pytest.approx(blocks, rel=1e-3)
    total = sum(counted.values()) + other_parameters(DiTConfig())
    assert total == pytest.approx(recorded["wan22_s2v_14b_dit.json"]["params"], rel=2e-3)


def test_formulas_agree_with_the_traced_model() -> None:
    """The streaming forward at an odd size, traced abstractly and unrolled."""
    config = DiTConfig(
        layers=3, width=64, heads=4, ffn_width=160, text_dim=32, text_len=16, audio_dim=24, audio_layers=3,
        inject_layers=(0, 2), freq_dim=32,
    )  # fmt: skip
    for cached in (True, False):
        arguments = jax.eval_shape(
            lambda: step_arguments(config, SamplingConfig(), 18, 10, dtype=jnp.float32, text_cached=cached)  # noqa: B023
        )
        counted = count_flops(step_function(unroll=True, text_cached=cached), *arguments)
        worked_out = sum(StreamShape(config=config, height=18, width=10).flops(text_cached=cached).values())
        assert counted == pytest.approx(worked_out, rel=0.02)


def test_weights_drawn_in_eight_bits_are_those_of_a_quantised_model() -> None:
    config = DiTConfig(
        layers=2, width=32, heads=2, ffn_width=48, text_dim=8, text_len=4, audio_dim=8, audio_layers=2,
        inject_layers=(1,), freq_dim=16,
    )  # fmt: skip

    def make() -> CausalDiT:
        return CausalDiT(config, rngs=nnx.Rngs(0))

    drawn = random_model(make, jnp.float32, quantized=True)
    wanted = jax.eval_shape(lambda: quantize(make()))
    assert jax.tree.structure(drawn) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(drawn), jax.tree.leaves(wanted), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert np.asarray(got, np.float32).any()
