"""Compute in bfloat16 with float32 master weights: what is cast, and what stays."""

from __future__ import annotations

import re
from typing import Literal, TypeVar

import jax.numpy as jnp

from lavatar_jax.parallel import STACKED, gather_parts
from lavatar_jax.training.state import Merge, Params

Model = TypeVar("Model")
Precision = Literal["float32", "bfloat16"]

# The transformer computes these in float32 whatever it is given; rounded weights would only lose accuracy.
_FLOAT32 = re.compile(r"(audio_encoder|time_embed|time_project|head)\..*|blocks\.(modulation|norm3\..*)")


def is_float32(name: str) -> bool:
    """Whether a parameter of this dotted path keeps float32 in a bfloat16 model."""
    return _FLOAT32.fullmatch(name) is not None


def dtype_of(name: str, precision: Precision) -> jnp.dtype:
    """The dtype that a parameter is computed with."""
    return jnp.dtype(jnp.float32 if is_float32(name) else precision)


def compute_in(merge: Merge[Model], precision: Precision) -> Merge[Model]:
    """A `merge` for training steps: parameters are cast, and gathered where they are split over devices.

    Stacked layers stay split: the model gathers them one by one. Gradients arrive in the masters' float32.
    """

    def cast(params: Params) -> Params:
        chosen = {name: value.astype(dtype_of(name, precision)) for name, value in params.items()}
        whole = gather_parts({n: v for n, v in chosen.items() if n.split(".")[0] not in STACKED})
        return {**chosen, **whole}

    def merged(params: Params, frozen: Params | None = None, /) -> Model:
        return merge(cast(params), cast(frozen or {}))

    return merged
