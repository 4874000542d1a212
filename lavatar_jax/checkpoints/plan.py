"""Which tensor of a checkpoint goes where in a model, decided before any number is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lavatar_jax.checkpoints.convert import Rule, assign, key_of, param_paths
from lavatar_jax.checkpoints.sources import TensorInfo
from lavatar_jax.checkpoints.transforms import Transform
from lavatar_jax.errors import UserError

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter and the tensors that fill it: one, or one for each layer of its first axis."""

    path: str
    shape: tuple[int, ...]
    stacked: bool
    keys: tuple[str, ...]
    transforms: tuple[Transform, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a checkpoint and a model have in common, and every way in which they do not fit.

    `mapped` keys fill a parameter; `dropped` keys are known and not needed; `parameters` and `nbytes` count
    the mapped tensors as they are stored. The others are messages that name file and tensor.
    """

    component: str
    leaves: tuple[Leaf, ...]
    mapped: tuple[str, ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    parameters: int
    nbytes: int

    @property
    def problems(self) -> tuple[str, ...]:
        return self.missing + self.unexpected + self.mismatched

    def check(self) -> None:
        """Raises UserError with the first problems, if there are any."""
        if problems := self.problems:
            more = f"; and {len(problems) - 3} more (--dry-run lists all)" if len(problems) > 3 else ""
            raise UserError(f"{self.component}: {'; '.join(problems[:3])}{more}")


def make_plan(component: str, infos: Mapping[str, TensorInfo], rules: Sequence[Rule], model: Any) -> Plan:
    """Match a checkpoint's tensors with the parameters of a model, which may be abstract (jax.eval_shape).

    Nothing is allocated: shapes go through the transforms as arrays of stride 0.
    """
    parameters = param_paths(model)
    assigned, problems = assign(infos, rules, parameters)
    file = next(iter({info.file for info in infos.values()}), "the checkpoint")
    unexpected = [_with_file(problem, infos) for problem in problems]
    missing: list[str] = []
    mismatched: list[str] = []
    leaves: list[Leaf] = []
    for path, parameter in parameters.items():
        by_layer = assigned.get(path, {})
        stacked = any(rule.stacked and key_of([rule], path, 0) for rule in rules)
        wanted: list[int | None] = list(range(parameter.shape[0])) if stacked else [None]
        for layer in wanted:
            if layer not in by_layer:
                where = "" if layer is None else f" (layer {layer})"
                key = key_of(rules, path, layer)
                missing.append(f"{file}: the tensor {key or '?'} is missing, which fills {path}{where}")
        for layer, (key, _) in by_layer.items():
            if layer not in wanted:
                unexpected.append(f"{infos[key].file}: {key} is of a layer that {path} does not have")
        found = [by_layer[layer] for layer in wanted if layer in by_layer]
        shape = tuple(parameter.shape[1:] if stacked else parameter.shape)
        transforms = tuple(rule.resolve_transform() for _, rule in found)
        for (key, _), transform in zip(found, transforms, strict=True):
            if problem := _misfit(infos[key], transform, shape):
                mismatched.append(f"{infos[key].file}: the tensor {key} {problem}")
        keys = tuple(key for key, _ in found)
        leaves.append(Leaf(path, tuple(parameter.shape), stacked, keys, transforms))
    mapped = tuple(key for leaf in leaves for key in leaf.keys)
    unneeded = [re.compile(rule.pattern) for rule in rules if rule.path is None]
    return Plan(
        component=component,
        leaves=tuple(leaves),
        mapped=mapped,
        dropped=tuple(key for key in infos if any(pattern.fullmatch(key) for pattern in unneeded)),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched),
        parameters=sum(infos[key].nbytes // infos[key].dtype.itemsize for key in mapped),
        nbytes=sum(infos[key].nbytes for key in mapped),
    )


def _misfit(info: TensorInfo, transform: Transform, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor for a place of this shape."""
    if info.dtype not in FLOATS:
        return f"has dtype {info.dtype}, expected float32, float16 or bfloat16"
    try:
        found = transform.forward(np.broadcast_to(np.zeros((), info.dtype), info.shape)).shape
    except ValueError as error:
        return f"{list(info.shape)}: {error}"
    if found != shape:
        origin = transform.inverse and transform.inverse(np.broadcast_to(np.zeros((), info.dtype), shape))
        expected = f"expected {list(shape if origin is None else origin.shape)}"
        return f"has shape {list(info.shape)}, {expected}"
    return None


def _with_file(problem: str, infos: Mapping[str, TensorInfo]) -> str:
    key = next((word for word in problem.split() if word in infos), None)
    return problem if key is None else f"{infos[key].file}: {problem}"
