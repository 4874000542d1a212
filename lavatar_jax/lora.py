"""Low-rank adapters beside the weights of linear layers: add, train alone, merge exactly.

A weight W [in, out] becomes W + alpha / r * A B with A [in, r] and B [r, out] (transposed, PyTorch's
W' = W + alpha / r * B A). Which layers have adapters follows the release (reference behaviour 9): queries,
keys, values and outputs of all attention, and the feed-forward, of blocks and audio injectors.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lavatar_jax.quant import QuantizedWeight, dotted

Model = TypeVar("Model")
Adapters = dict[str, jax.Array]  # by dotted path, `blocks.self_attn.q.weight.a`

# Dotted paths of the weights that the released model adapts.
TARGETS = r"(blocks\.((self|cross)_attn\.[qkvo]|ffn\.(inner|outer))|injectors\.attention\.[qkvo])\.weight"
_ADAPTER = re.compile(r".*\.weight\.[ab]")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """What `Linear.weight` holds in place of an array; `x @ weight` works as with one, in the dtype of x.

    `base` is an array or a `quant.QuantizedWeight`. `a`, `b` may have another dtype than the base: they are
    trained in float32.
    """

    base: Array | QuantizedWeight  # [*L, in, out]
    a: Float[Array, "*L I r"]
    b: Float[Array, "*L r O"]
    scale: float = dataclasses.field(metadata={"static": True})  # alpha / r

    def __rmatmul__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return x @ self.base + self.scale * ((x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype))

    def merge(self) -> Float[Array, "*L I O"]:
        """One weight that does the same: computed in float32, rounded once to the base's dtype.

        Raises ValueError if the base is quantised, as the merged weight would have to be rounded anew.
        """
        if isinstance(self.base, QuantizedWeight):
            raise ValueError("adapters cannot be merged into quantised weights: merge first, then quantise")
        change = jnp.matmul(self.a, self.b, precision="highest", preferred_element_type=jnp.float32)
        return (self.base.astype(jnp.float32) + self.scale * change).astype(self.base.dtype)


def add_adapters(
    model: Model,
    key: Array,
    *,
    rank: int = 128,
    alpha: float = 64.0,
    targets: str = TARGETS,
    dtype: Any = jnp.float32,
) -> Model:
    """New adapters beside the weights whose dotted path matches `targets`; the model computes the same.

    A is uniform in +-1 / sqrt(in) as peft draws it, B is zero. For abstract models use jax.eval_shape.
    Raises ValueError if no weight matches, or one has an adapter already.
    """
    count = 0

    def adapt(path: tuple[Any, ...], weight: Any) -> Any:
        nonlocal count
        name = dotted(path)
        if not re.fullmatch(targets, name):
            return weight
        if isinstance(weight, AdaptedWeight):
            raise ValueError(f"{name} has an adapter already: merge it first")
        count += 1
        *stack, n_in, n_out = (weight.values if isinstance(weight, QuantizedWeight) else weight).shape
        bound = 1.0 / np.sqrt(n_in)
        a = jax.random.uniform(jax.random.fold_in(key, count), (*stack, n_in, rank), dtype, -bound, bound)
        return AdaptedWeight(weight, a, jnp.zeros((*stack, rank, n_out), dtype), alpha / rank)

    # Quantised and adapted weights are nodes of the tree; here they are leaves.
    adapted = jax.tree_util.tree_map_with_path(adapt, model, is_leaf=_is_weight)
    if not count:
        raise ValueError(f"{type(model).__name__} has no weight that matches {targets}")
    return adapted


def merge(model: Model) -> Model:
    """The model with every adapter merged into its weight; a model without adapters stays as it is."""
    return jax.tree.map(
        lambda leaf: leaf.merge() if isinstance(leaf, AdaptedWeight) else leaf, model, is_leaf=_is_weight
    )


def split_adapters(model: Model) -> tuple[Adapters, Model]:
    """-> (the adapters' arrays by dotted path, the rest of the model): what is trained, and what is not.

    The rest is a pytree too, with None where the adapters were: pass it to a jitted step as an argument, and
    put both together there with `join_adapters`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model)
    adapters = {dotted(path): leaf for path, leaf in leaves if _ADAPTER.fullmatch(dotted(path))}
    rest = jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if dotted(path) in adapters else leaf, model
    )
    return adapters, rest


def join_adapters(adapters: Adapters, rest: Model) -> Model:
    """The inverse of `split_adapters`. Raises KeyError if an adapter is missing."""

    def fill(path: tuple[Any, ...], leaf: Any) -> Any:
        return adapters[dotted(path)] if leaf is None and _ADAPTER.fullmatch(dotted(path)) else leaf

    return jax.tree_util.tree_map_with_path(fill, rest, is_leaf=lambda node: node is None)


def _is_weight(node: Any) -> bool:
    return isinstance(node, AdaptedWeight | QuantizedWeight)
