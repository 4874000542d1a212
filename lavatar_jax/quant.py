"""8-bit floats (e4m3) in the large linear layers of the transformer, by the rule of the released code.

A tensor is multiplied by `scale = min(448 / amax, 448)` and rounded to e4m3, whose largest number is 448; the
product of two such tensors is divided by both scales. Weights are rounded once, activations at every call
with the amax of all tokens of the call (reference behaviour 10). The cap means that a tensor below 1, which
every weight is in practice, is simply multiplied by 448.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Model = TypeVar("Model")

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0

# All linear layers but those that embed time and text, the audio encoder's and the head's.
_LINEARS = re.compile(
    r"(blocks\.((self|cross)_attn\.[qkvo]|ffn\.(inner|outer))|injectors\.(attention\.[qkvo]|adain))\.weight"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """What `Linear.weight` holds in place of an array; `x @ weight` works as with one, result in float32.

    `inverse_scale` [..., 1, 1] is for the whole weight, [..., 1, out] for its columns; stacked layers each
    have their own.
    """

    values: Float[Array, "*L I O"]  # e4m3
    inverse_scale: Float[Array, "*L 1 O_or_1"]  # float32

    def __rmatmul__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        codes, inverse_scale = round_to_e4m3(x, jnp.max(jnp.abs(x)))
        # Operands in e4m3 and the scales behind the product: XLA lowers this to the 8-bit kernel of GPUs that
        # have one. Other devices convert the operands, with the same result.
        y = jax.lax.dot_general(
            codes.reshape(-1, codes.shape[-1]),
            self.values,
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        y = y * (inverse_scale * self.inverse_scale)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def dequantize(self) -> Float[Array, "*L I O"]:
        """The weight that is computed with, in float32."""
        return self.values.astype(jnp.float32) * self.inverse_scale


def round_to_e4m3(
    x: Float[Array, "*S"], amax: Float[Array, "*A"], *, capped: bool = True
) -> tuple[Float[Array, "*S"], Float[Array, "*A"]]:
    """-> (codes in e4m3, float32 factor that brings them back). `amax` broadcasts against x."""
    scale = E4M3_MAX / jnp.maximum(amax.astype(jnp.float32), 1e-12)
    if capped:
        scale = jnp.minimum(scale, E4M3_MAX)
    # The reference multiplies in the dtype of x, so that a bfloat16 is rounded to bfloat16 first. An explicit
    # rounding, because the compiler may leave out a conversion there and back.
    info = jnp.finfo(x.dtype)
    scaled = jax.lax.reduce_precision(x.astype(jnp.float32) * scale, info.nexp, info.nmant)
    return jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(E4M3), 1.0 / scale


@functools.partial(jax.jit, static_argnames="per_channel")
def quantize_weight(weight: Float[Array, "*L I O"], *, per_channel: bool = False) -> QuantizedWeight:
    """One scale per layer, as the reference; `per_channel`: one per output, using all of e4m3's range."""
    amax = jnp.max(jnp.abs(weight), axis=-2 if per_channel else (-2, -1), keepdims=True)
    return QuantizedWeight(*round_to_e4m3(weight, amax, capped=not per_channel))


def is_quantized(path: str) -> bool:
    """Whether `quantize` rounds the parameter of this dotted path (`blocks.self_attn.q.weight`)."""
    return _LINEARS.fullmatch(path) is not None


def dotted(path: tuple) -> str:
    """A parameter's path in the tree as `blocks.self_attn.q.weight`."""
    return jax.tree_util.keystr(path, simple=True, separator=".").replace(".value", "", 1)


def quantize(model: Model, *, per_channel: bool = False) -> Model:
    """A transformer whose large linear layers hold `QuantizedWeight`s; all else stays as it is.

    Under adapters (`lora.AdaptedWeight`) the base weight is rounded. For abstract models use jax.eval_shape.
    Raises ValueError if the model has none of these layers, or has them rounded already.
    """
    count = 0

    def convert(path: tuple, leaf: Array) -> Array | QuantizedWeight:
        nonlocal count
        name = dotted(path)
        if not is_quantized(name.removesuffix(".base")):
            return leaf
        count += 1
        return quantize_weight(leaf, per_channel=per_channel)

    quantized = jax.tree_util.tree_map_with_path(convert, model)
    if not count:
        raise ValueError(f"{type(model).__name__} has no linear layer that can be quantised")
    return quantized
