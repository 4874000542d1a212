"""Compute in bfloat16, or with operands of bfloat16, with float32 master weights: what is cast."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lavatar_jax.parallel import STACKED, gather_parts, is_sharded
from lavatar_jax.quant import is_quantized
from lavatar_jax.training.state import Merge, Params

Model = TypeVar("Model")
Stored = Literal["float32", "bfloat16"]
# "operands": float32 but for the products of the transformer's large linear layers, whose operands are
# rounded to bfloat16 and whose results are float32, in the backward pass too. For CPUs that multiply bfloat16
# twice as fast (AVX-512 BF16, AMX) and are slow at all else in it.
Precision = Literal["float32", "bfloat16", "operands"]

# The transformer computes these in float32 whatever it is given; rounded weights would only lose accuracy.
_FLOAT32 = re.compile(r"(audio_encoder|time_embed|time_project|head)\..*|blocks\.(modulation|norm3\..*)")


def is_float32(name: str) -> bool:
    """Whether a parameter of this dotted path keeps float32 in a bfloat16 model."""
    return _FLOAT32.fullmatch(name) is not None


def dtype_of(name: str, precision: Precision) -> jnp.dtype:
    """The dtype that a parameter is computed with."""
    return jnp.dtype(jnp.bfloat16 if precision == "bfloat16" and not is_float32(name) else jnp.float32)


@jax.custom_vjp
def operands_product(x: Float[Array, "*B I"], weight: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """`x @ weight` of operands that are rounded to bfloat16, summed in float32; so are its gradients."""
    return _product_forward(x, weight)[0]


def _product_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    x, weight = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    return _contract(x, weight, (x.ndim - 1,), (0,)), (x, weight)


def _product_backward(saved: tuple[Array, Array], error: Array) -> tuple[Array, Array]:
    x, weight = saved
    error = error.astype(jnp.bfloat16)
    rows = tuple(range(x.ndim - 1))
    by_x = _contract(error, weight, (x.ndim - 1,), (1,))
    if is_sharded() or sum(x.shape[axis] > 1 for axis in rows) < 2:
        # XLA's CPU backend (jax 0.10.2) refuses products of bfloat16 over one leading axis, and a device may
        # have one sample only.
        x, error = x.astype(jnp.float32), error.astype(jnp.float32)
    return by_x, _contract(x, error, rows, rows)


def _contract(a: Array, b: Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...]) -> Array:
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), preferred_element_type=jnp.float32)


operands_product.defvjp(_product_forward, _product_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedWeight:
    """What `Linear.weight` holds in place of an array; `x @ weight` is `operands_product`."""

    value: Float[Array, "*L I O"]  # float32

    def __rmatmul__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return operands_product(x, self.value)


def multiplies_bfloat16(cpu: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the default device is a CPU with instructions for products of bfloat16."""
    if jax.default_backend() != "cpu":
        return False
    flags = cpu.read_text().split() if cpu.is_file() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def compute_in(merge: Merge[Model], precision: Precision) -> Merge[Model]:
    """A `merge` for training steps: parameters are cast, and gathered where they are split over devices.

    Stacked layers stay split: the model gathers them one by one. Gradients arrive in the masters' float32.
    `precision` "operands" is float32 in a VAE, on GPUs, and on CPUs that would gain nothing by it.
    """
    if precision == "operands" and not multiplies_bfloat16():
        precision = "float32"

    def cast(params: Params) -> dict[str, Any]:
        chosen = {name: value.astype(dtype_of(name, precision)) for name, value in params.items()}
        whole = gather_parts({n: v for n, v in chosen.items() if n.split(".")[0] not in STACKED})
        chosen = {**chosen, **whole}
        if precision != "operands":
            return chosen
        return {
            n: RoundedWeight(v) if is_quantized(n.removesuffix(".base")) else v for n, v in chosen.items()
        }

    def merged(params: Params, frozen: Params | None = None, /) -> Model:
        return merge(cast(params), cast(frozen or {}))

    return merged
