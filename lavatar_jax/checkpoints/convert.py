"""Convert PyTorch checkpoints to our models and back, by a table of rules.

A table is a list of `Rule`s. Nothing is guessed: every tensor must be named by exactly one rule, every
parameter must be filled exactly once, and all that does not fit is reported together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lavatar_jax.checkpoints.transforms import TRANSFORMS, Transform
from lavatar_jax.errors import UserError

Model = TypeVar("Model")
Source = tuple[str, "Rule"]  # a PyTorch key and the rule that names it

_GROUP = re.compile(r"\((?:\?P<(?P<name>\w+)>)?\\d\+\)")  # (\d+) and (?P<name>\d+) in a key pattern
_REFERENCE = re.compile(r"\\(?:(?P<number>\d)|g<(?P<name>\w+)>)")  # \1 and \g<name> in a path


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""One line of a conversion table.

    `pattern` is a regular expression for whole PyTorch keys, `path` the dotted path of our parameter with
    group references such as `\1`. A group called `layer` in the pattern is the position in our leaf's
    leading axis, along which the tensors of all layers are stacked. `path` None drops the tensor.
    `transform` is a name in TRANSFORMS or a Transform. Export needs patterns made of literal text, `(\d+)`
    and `(?P<name>\d+)` only.
    """

    pattern: str
    path: str | None
    transform: str | Transform = "identity"

    @property
    def stacked(self) -> bool:
        return "(?P<layer>" in self.pattern

    def resolve_transform(self) -> Transform:
        return TRANSFORMS[self.transform] if isinstance(self.transform, str) else self.transform


class ConversionError(UserError):
    """A checkpoint, a table and a model do not fit together; `problems` lists everything that is wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        heading = f"the checkpoint does not fit the model ({len(problems)} problem(s)):"
        super().__init__("\n- ".join([heading, *problems]))


def param_paths(model: Any) -> dict[str, Any]:
    """Dotted path -> leaf (array or jax.ShapeDtypeStruct) of a model, in the order of its pytree."""
    return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def convert(tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], model: Model) -> Model:
    """Fill a model from PyTorch tensors.

    `model` may be abstract (from jax.eval_shape); its leaves say which shapes and dtypes come out, its
    numbers are not used. `tensors` may be lazy: each is read once, when its parameter is assembled.
    float32, float16 and bfloat16 tensors are accepted and cast to the dtype of the leaf.

    Raises ConversionError with every unknown key, key named by several rules, parameter filled twice or not
    at all, missing or surplus layer, wrong shape and unusable dtype.
    """
    leaves = param_paths(model)
    sources, problems = assign(tensors, rules, leaves)
    filled: dict[str, jax.Array] = {}
    for path, leaf in leaves.items():
        by_layer = sources.get(path, {})
        count = leaf.shape[0] if leaf.shape and None not in by_layer else 0
        if not by_layer:
            problems.append(f"nothing fills the parameter {path} {list(leaf.shape)}")
        elif None not in by_layer and set(by_layer) != set(range(count)):
            missing = [layer for layer in range(count) if layer not in by_layer]
            surplus = [layer for layer in by_layer if layer not in range(count)]
            problems.append(f"the parameter {path} has {count} layers: missing {missing}, surplus {surplus}")
        else:
            try:
                filled[path] = _assemble(tensors, by_layer, leaf)
            except ValueError as error:
                problems.append(f"the parameter {path}: {error}")
    if problems:
        raise ConversionError(problems)
    structure = jax.tree_util.tree_structure(model)
    return jax.tree_util.tree_unflatten(structure, [filled[path] for path in leaves])


def export(model: Any, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The inverse of `convert`: PyTorch keys and layouts, dtypes as in the model.

    Where several rules lead to a parameter (older names of a key), the first one is used.
    Raises ConversionError listing parameters that no rule names and rules that cannot be inverted.
    """
    tensors: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for path, leaf in param_paths(model).items():
        matches = ((rule, _match_path(rule, path)) for rule in rules)
        match = next(((rule, groups) for rule, groups in matches if groups is not None), None)
        if match is None:
            problems.append(f"no rule names the parameter {path}")
            continue
        rule, groups = match
        inverse = rule.resolve_transform().inverse
        if inverse is None or not _invertible(rule):
            problems.append(f"the rule for {path} cannot be inverted")
            continue
        array = np.asarray(leaf)
        for layer in range(array.shape[0]) if rule.stacked else [None]:
            key = _key_of(rule, groups, layer)
            if key in tensors:
                problems.append(f"two parameters become the key {key}")
            tensors[key] = np.ascontiguousarray(inverse(array if layer is None else array[layer]))
    if problems:
        raise ConversionError(problems)
    return tensors


def _dotted(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return ".".join(part for part in parts if part != "value")  # what is inside an nnx.Param


def assign(
    keys: Iterable[str], rules: Sequence[Rule], leaves: Mapping[str, Any]
) -> tuple[dict[str, dict[int | None, Source]], list[str]]:
    """Which key goes to which path and layer (None: the whole), and everything that is wrong with that."""
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    sources: dict[str, dict[int | None, Source]] = {}
    problems: list[str] = []
    for key in keys:
        matches = [(match, rule) for pattern, rule in compiled if (match := pattern.fullmatch(key))]
        if not matches:
            problems.append(f"unknown key {key}")
            continue
        if len(matches) > 1:
            problems.append(f"the key {key} matches {len(matches)} rules: {[r.pattern for _, r in matches]}")
            continue
        match, rule = matches[0]
        if rule.path is None:
            continue
        path = match.expand(rule.path)
        layer = int(match["layer"]) if rule.stacked else None
        if path not in leaves:
            problems.append(f"the key {key} leads to {path}, which the model does not have")
            continue
        by_layer = sources.setdefault(path, {})
        if layer in by_layer or (by_layer and (layer is None or None in by_layer)):
            other = by_layer.get(layer) or next(iter(by_layer.values()))
            problems.append(f"the parameter {path} is filled by both {other[0]} and {key}")
            continue
        by_layer[layer] = (key, rule)
    return sources, problems


def _assemble(tensors: Mapping[str, np.ndarray], by_layer: dict[int | None, Source], leaf: Any) -> jax.Array:
    """The parameter's value from its tensor, or its layers' tensors. Raises ValueError on a wrong shape."""
    stacked = None not in by_layer
    want = leaf.shape[1:] if stacked else leaf.shape
    parts = []
    for _, (key, rule) in sorted(by_layer.items(), key=lambda item: item[0] or 0):
        tensor = np.asarray(tensors[key])
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{key} has dtype {tensor.dtype}, expected a floating point type")
        try:
            part = rule.resolve_transform().forward(tensor)
        except ValueError as error:
            raise ValueError(f"{key} {list(tensor.shape)}: {error}") from error
        if part.shape != want:
            raise ValueError(f"{key} {list(tensor.shape)} becomes {list(part.shape)}, expected {list(want)}")
        parts.append(part.astype(leaf.dtype))
    return jnp.asarray(np.stack(parts) if stacked else parts[0])


# Inversion of rules


def rule_of(rules: Sequence[Rule], path: str) -> Rule | None:
    """The first rule that names a parameter and can be inverted."""
    return next((rule for rule in rules if _match_path(rule, path) is not None and _invertible(rule)), None)


def key_of(rules: Sequence[Rule], path: str, layer: int | None) -> str | None:
    """The PyTorch key of a parameter (of its layer, where layers are stacked); None if no rule gives one."""
    rule = rule_of([rule for rule in rules if rule.stacked == (layer is not None)], path)
    return None if rule is None else _key_of(rule, _match_path(rule, path) or {}, layer)


def _match_path(rule: Rule, path: str) -> dict[str, str] | None:
    """The group values (by number and by name) for which the rule's path is this one, or None."""
    if rule.path is None:
        return None
    regex, end = "", 0
    for reference in _REFERENCE.finditer(rule.path):
        group = "g" + (reference["number"] or reference["name"])
        regex += re.escape(rule.path[end : reference.start()])
        # A reference used twice must have the same value twice.
        regex += f"(?P={group})" if f"(?P<{group}>" in regex else f"(?P<{group}>\\d+)"
        end = reference.end()
    match = re.fullmatch(regex + re.escape(rule.path[end:]), path)
    return None if match is None else {name[1:]: value for name, value in match.groupdict().items()}


def _invertible(rule: Rule) -> bool:
    """Whether the key pattern is literal text and number groups, all of which the path or the layer gives."""
    literal = _GROUP.sub("", rule.pattern).replace("\\.", "")
    references = {m["number"] or m["name"] for m in _REFERENCE.finditer(rule.path or "")} | {"layer"}
    known = (
        str(index) in references or group["name"] in references
        for index, group in enumerate(_GROUP.finditer(rule.pattern), start=1)
    )
    return re.fullmatch(r"[\w./-]*", literal) is not None and all(known)


def _key_of(rule: Rule, groups: dict[str, str], layer: int | None) -> str:
    """The PyTorch key of a rule for these group values."""
    key, end = "", 0
    for index, group in enumerate(_GROUP.finditer(rule.pattern), start=1):
        value = groups.get(str(index)) or groups.get(group["name"] or "") or str(layer)
        key += rule.pattern[end : group.start()] + value
        end = group.end()
    return (key + rule.pattern[end:]).replace("\\.", ".")
