"""The arrays that a parameter becomes on disk: cast, merged with a LoRA, or rounded to 8 bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array

from lavatar_jax.checkpoints.lora_keys import LoraPair, merged
from lavatar_jax.checkpoints.manifest import DType
from lavatar_jax.checkpoints.plan import Leaf
from lavatar_jax.checkpoints.sources import Tensors
from lavatar_jax.checkpoints.stream_write import BLOCK_BYTES, Layer, Output, bits_of, copy_bits
from lavatar_jax.checkpoints.transforms import Transform
from lavatar_jax.quant import E4M3, is_quantized, round_to_e4m3

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
DTYPES = {"bf16": BFLOAT16, "fp8": BFLOAT16, "fp32": FLOAT32}  # of what is not rounded to 8 bits

Read = Callable[[], np.ndarray]  # a layer in our layout, a view of what was read


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the tensors of one component are written.

    `dtype`: bf16, fp8 (bf16 with large linear layers of the transformer in e4m3, `per_channel`: with a scale
    for each output) or fp32. `pairs`: LoRA pairs by module (`blocks.0.self_attn.q`), `merge`d into the
    weights or kept beside them, where `scale` is the factor of all. `replaced`: keys that are read from
    other files.
    """

    dtype: DType
    per_channel: bool = False
    pairs: Mapping[str, LoraPair] = dataclasses.field(default_factory=dict)
    merge: bool = True
    scale: float = 1.0
    replaced: Mapping[str, tuple[Tensors, str]] = dataclasses.field(default_factory=dict)


def outputs_of(leaves: Iterable[Leaf], tensors: Tensors, recipe: Recipe) -> Iterator[Output]:
    """All arrays of a component, in the order of the model's parameters."""
    dtype = DTYPES[recipe.dtype]
    for leaf in leaves:
        weights = [_read(tensors, key, t, recipe) for key, t in zip(leaf.keys, leaf.transforms, strict=True)]
        pairs = [recipe.pairs.get(key.removesuffix(".weight")) for key in leaf.keys]
        base = leaf
        if not recipe.merge and any(pairs):
            base = dataclasses.replace(leaf, path=f"{leaf.path}.base")
            yield from _adapters(leaf, pairs, recipe.scale)
        if recipe.dtype == "fp8" and is_quantized(leaf.path):
            yield from _quantised(base, weights, recipe.per_channel)
        else:
            layers = tuple(functools.partial(_cast, read, dtype) for read in weights)
            yield Output(base.path, leaf.shape, dtype, leaf.stacked, layers)


@dataclasses.dataclass(frozen=True)
class Cast:
    """A layer in another dtype."""

    numbers: np.ndarray
    dtype: np.dtype

    def rows(self, rows: slice) -> np.ndarray:
        return (self.numbers[rows] if self.numbers.ndim else self.numbers).astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class Codes:
    """A layer [in, out] rounded to e4m3, by its largest magnitudes [1, 1] or [1, out]."""

    numbers: np.ndarray
    amax: np.ndarray
    per_channel: bool

    def rows(self, rows: slice) -> np.ndarray:
        return np.asarray(self._round(self.numbers[rows].astype(BFLOAT16, copy=False))[0])

    def inverse_scale(self) -> np.ndarray:
        return np.asarray(self._round(np.zeros_like(self.amax, BFLOAT16))[1])

    def _round(self, numbers: np.ndarray) -> tuple[Array, Array]:
        contiguous = np.empty(numbers.shape, BFLOAT16)
        copy_bits(contiguous, numbers)
        return _round(contiguous, self.amax, capped=not self.per_channel)


def _read(tensors: Tensors, key: str, transform: Transform, recipe: Recipe) -> Read:
    source, name = recipe.replaced.get(key, (tensors, key))
    pair = recipe.pairs.get(key.removesuffix(".weight")) if recipe.merge else None

    def read() -> np.ndarray:
        numbers = source.read(name)
        if pair is not None:
            if recipe.dtype == "fp32":  # the merge rounds to the dtype of the weight
                numbers = numbers.astype(FLOAT32, copy=False)
            numbers = merged(numbers, pair)
        return transform.forward(numbers)

    return read


def _cast(read: Read, dtype: np.dtype) -> Layer:
    return Cast(read(), dtype)


def _quantised(leaf: Leaf, weights: list[Read], per_channel: bool) -> Iterator[Output]:
    scales: dict[int, np.ndarray] = {}  # found while the codes are written; read again after a restart

    def codes(index: int) -> Codes:
        numbers = weights[index]()
        layer = Codes(numbers, _amax(numbers, per_channel), per_channel)
        scales[index] = layer.inverse_scale()
        return layer

    def inverse_scale(index: int) -> Cast:
        return Cast(scales[index] if index in scales else codes(index).inverse_scale(), FLOAT32)

    shape = (*leaf.shape[:-2], 1, leaf.shape[-1] if per_channel else 1)
    for name, part, size, dtype in (
        ("values", codes, leaf.shape, np.dtype(E4M3)),
        ("inverse_scale", inverse_scale, shape, FLOAT32),
    ):
        layers: Any = tuple(functools.partial(part, index) for index in range(len(weights)))
        yield Output(f"{leaf.path}.{name}", size, dtype, leaf.stacked, layers)


def _adapters(leaf: Leaf, pairs: list[LoraPair | None], scale: float) -> Iterator[Output]:
    """The two matrices in our layout, [in, r] and [r, out]; zeros for layers without a pair.

    Pairs with another factor than `scale` have the difference multiplied into the second matrix.
    """
    rank = max(pair.rank for pair in pairs if pair is not None)
    *stack, n_in, n_out = leaf.shape

    def a(pair: LoraPair | None) -> Cast:
        matrix = np.zeros((n_in, rank), np.float32)
        if pair is not None:
            matrix[:, : pair.rank] = pair.a.T
        return Cast(matrix, FLOAT32)

    def b(pair: LoraPair | None) -> Cast:
        matrix = np.zeros((rank, n_out), np.float32)
        if pair is not None:
            matrix[: pair.rank] = pair.b.T
            matrix *= np.float32(pair.scale() / scale)
        return Cast(matrix, FLOAT32)

    for name, part, shape in (("a", a, (*stack, n_in, rank)), ("b", b, (*stack, rank, n_out))):
        layers = tuple(functools.partial(part, pair) for pair in pairs)
        yield Output(f"{leaf.path}.{name}", shape, FLOAT32, leaf.stacked, layers)


def _amax(numbers: np.ndarray, per_channel: bool) -> np.ndarray:
    """Largest magnitudes of a weight [in, out] in bfloat16, in which it is rounded: [1, out] or [1, 1]."""
    step = max(BLOCK_BYTES * numbers.shape[1] // numbers.nbytes, 1)  # columns: rows of PyTorch's tensor
    parts = []
    for start in range(0, numbers.shape[1], step):
        block = numbers[:, start : start + step].astype(BFLOAT16, copy=False)
        magnitude = bits_of(block) & 0x7FFF  # without the sign, bits are in the order of the numbers
        parts.append(magnitude.max(axis=0, keepdims=True))
    amax = np.concatenate(parts, axis=1).view(BFLOAT16)
    return amax if per_channel else amax.max(keepdims=True)


@functools.partial(jax.jit, static_argnames="capped")  # compiled, as quant.quantize_weight is: the same bits
def _round(numbers: Array, amax: Array, *, capped: bool) -> tuple[Array, Array]:
    return round_to_e4m3(numbers, amax, capped=capped)
