"""Cases 13 and 14: LoRA merge and 8-bit linear layers."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from lavatar_jax.checkpoints.convert import convert, export
from lavatar_jax.checkpoints.lora_keys import merged, read_lora
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.layers import Linear
from lavatar_jax.quant import quantize_weight, round_to_e4m3
from tools.parity.case import EXACT, Case, Check, dit_config


def lora(case: Case) -> Iterator[Check]:
    """The file's pairs merged into the PyTorch weights, which then go through the converter and back."""
    config, want, tolerance = dit_config(case["config"]), dict(case.outputs())[""], case.tolerance("float32")
    pairs = read_lora(case.inputs, {key: tensor.shape for key, tensor in case.weights.items()})
    yield Check("modules", sorted(pairs) == sorted(case["matched_modules"]), True, EXACT)
    tensors = dict(case.weights)
    for module, pair in pairs.items():
        tensors[f"{module}.weight"] = merged(tensors[f"{module}.weight"], pair, case["scaling"])
    model = convert(tensors, DIT_RULES, jax.eval_shape(lambda: CausalDiT(config, rngs=nnx.Rngs(0))))
    exported = export(model, DIT_RULES)
    for key, tensor in want.items():
        yield Check(key, exported[key], tensor, tolerance)


def fp8(case: Case) -> Iterator[Check]:
    """Codes and scales exactly; products of the layer in bfloat16, and before they are rounded to it."""
    want = dict(case.outputs())[""]
    half, emulated = case.tolerance("y_bf16"), case.tolerance("y_emulated_fp32")
    weight, bias = (jnp.asarray(case.weights[name], jnp.bfloat16) for name in ("weight", "bias"))
    rounded = quantize_weight(weight.T)
    plain = Linear(*weight.T.shape, rngs=nnx.Rngs(0))
    structure = jax.tree.structure(plain)
    plain, eight = (jax.tree.unflatten(structure, [bias, value]) for value in (weight.T, rounded))
    yield Check("weight_q", rounded.values.T.astype(jnp.float32), want["weight_q"], EXACT)
    yield Check("weight_inv_scale", rounded.inverse_scale[0], want["weight_inv_scale"], EXACT)
    for name, value in case.inputs.items():
        x = jnp.asarray(value, jnp.bfloat16)
        codes, inverse_scale = round_to_e4m3(x, jnp.max(jnp.abs(x)))
        yield Check(f"{name}_q", codes.astype(jnp.float32), want[f"{name}_q"], EXACT)
        yield Check(f"{name}_inv_scale", inverse_scale[None], want[f"{name}_inv_scale"], EXACT)
        y = x @ rounded + bias.astype(jnp.float32)
        yield Check(f"{name}_y_emulated_fp32", y, want[f"{name}_y_emulated_fp32"], emulated)
        yield Check(f"{name}_y_bf16", eight(x), want[f"{name}_y_bf16"], half)
        yield Check(f"{name}_y_bf16_unquantized", plain(x), want[f"{name}_y_bf16_unquantized"], half)
