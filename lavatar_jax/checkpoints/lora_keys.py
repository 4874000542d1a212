"""LoRA files of the transformer in every spelling that occurs: which pair changes which weight; the merge.

A pair of matrices A [r, in] and B [out, r] turns the weight W of a linear layer into W + alpha / r * B A.
The released loader knows one spelling and silently loads nothing from any other (reference behaviour 9); here
every tensor of the file must be understood, and a file without a single pair is an error.

    prefix   none, `base_model.model.`, `diffusion_model.`, `model.`, `transformer.`, ... (also several)
    module   `blocks.0.self_attn.q` or kohya's `lora_unet_blocks_0_self_attn_q`
    side     `.lora_A` `.lora_B`, `.lora_down` `.lora_up` or `.lora.down` `.lora.up`; then an adapter's name
             such as `.default` or none; then `.weight`
    alpha    `<module>.alpha`, a number in a tensor, or none
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lavatar_jax.checkpoints.plan import FLOATS
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.errors import UserError

# alpha / rank where the file does not say: the released adapters have rank 128 and were made with alpha 64.
DEFAULT_SCALE = 0.5

_PREFIX = re.compile(r"(?:(?:base_model\.model|diffusion_model|transformer|module|model|pipe|dit)\.)+")
_FLAT_PREFIX = re.compile(r"lora_(?:unet|transformer)_+")
_SIDE = re.compile(r"(?P<module>.+?)\.lora[._](?P<side>A|B|down|up)(?:\.[\w-]+)?\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.(?:lora_)?alpha")
_LAYER = r"(?P<layer>\d+)"
# Patterns of the names of all linear layers, e.g. `blocks\.(?P<layer>\d+)\.self_attn\.q`.
_LINEARS = [
    rule.pattern.removesuffix(r"\.weight")
    for rule in DIT_RULES
    if rule.transform == "linear" and rule.pattern.endswith(r"\.weight")
]
_ROWS = 1024  # of a weight that are merged at a time: bounds the float32 copies
_LISTED = 8  # problems that a message names


@dataclasses.dataclass(frozen=True)
class LoraPair:
    """The two matrices of one linear layer, by their keys in a file; they are read when asked for."""

    tensors: Mapping[str, Any]
    a_key: str
    b_key: str
    alpha_key: str | None = None

    @property
    def a(self) -> Float[np.ndarray, "r I"]:
        return np.asarray(self.tensors[self.a_key])

    @property
    def b(self) -> Float[np.ndarray, "O r"]:
        return np.asarray(self.tensors[self.b_key])

    @property
    def alpha(self) -> float | None:
        return None if self.alpha_key is None else float(np.asarray(self.tensors[self.alpha_key]).item())

    @property
    def rank(self) -> int:
        return self.tensors[self.a_key].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight that the pair changes."""
        return self.tensors[self.b_key].shape[0], self.tensors[self.a_key].shape[1]

    def scale(self, default: float = DEFAULT_SCALE) -> float:
        """alpha / r; `default` where the file has no alpha."""
        return default if self.alpha is None else self.alpha / self.rank


def read_lora(
    tensors: Mapping[str, Any],
    base: Mapping[str, Sequence[int]] | None = None,
    *,
    source: str = "the LoRA file",
) -> dict[str, LoraPair]:
    """All pairs of a file by the module's name in the published model, such as `blocks.0.self_attn.q`.

    `tensors` may be lazy: only `.shape` and `.dtype` of its values are looked at here. `base` has the shapes
    of the model's PyTorch weights, which the pairs must fit; without it only names and dtypes are checked.

    Raises UserError naming everything that is wrong: keys that are neither LoRA nor the model's (see
    `extra_keys`), modules that the model lacks, half pairs, two tensors in one place, ranks and shapes that
    do not fit, integers and 8-bit floats, which mean nothing without a scale; and if there is no pair at all.
    """
    parts: dict[str, dict[str, str]] = {}  # module -> side -> key
    whole: dict[str, str] = {}  # the model's key -> the file's
    problems: list[str] = []
    for key in tensors:
        place = _place(key)
        if place is None:
            name = base_key(key, base)
            if name is None:
                problems.append(f"unknown key {key}")
            elif name in whole:
                problems.append(f"{whole[name]} and {key} are the same tensor")
            else:
                whole[name] = key
            continue
        module, side = place
        if side in parts.setdefault(module, {}):
            problems.append(f"{parts[module][side]} and {key} are the same matrix")
        parts[module][side] = key
    matrices = [keys[side] for keys in parts.values() for side in "ab" if side in keys]
    for key in (*matrices, *whole.values()):
        if (dtype := tensors[key].dtype) not in (*FLOATS, np.float64):
            problems.append(f"{key} has dtype {dtype}, which is no float of 16 bits or more")
    pairs: dict[str, LoraPair] = {}
    for module, keys in parts.items():
        problem = _problem(tensors, module, keys, base)
        if problem is None:
            pairs[module] = LoraPair(tensors, keys["a"], keys["b"], keys.get("alpha"))
        else:
            problems.append(problem)
    if not pairs and not problems:
        problems = [f"none of its {len(tensors)} tensors belongs to a LoRA pair (lora_A/lora_B, down/up)"]
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UserError(
            f"{source} does not fit the model: {'; '.join(problems[:_LISTED])}{more}. "
            "Give a LoRA of this transformer, or leave it out"
        )
    return pairs


def base_key(key: str, base: Mapping[str, Any] | None = None) -> str | None:
    """The model's own key that a key of a LoRA file means; None if it means none.

    A LoRA file may carry whole tensors of the model, which replace those of the base (as in the release);
    peft calls a weight that is also adapted `<module>.base_layer.weight`.
    """
    name = _without_prefix(key).replace(".base_layer.", ".")
    if base is not None:
        return name if name in base else None
    return name if any(re.fullmatch(rule.pattern, name) for rule in DIT_RULES) else None


def extra_keys(tensors: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Whole tensors of the model that a LoRA file brings: the model's key -> the file's key."""
    named = ((base_key(key, base), key) for key in tensors if _place(key) is None)
    return {name: key for name, key in named if name is not None}


def merged(
    weight: Float[np.ndarray, "O I"], pair: LoraPair, default_scale: float = DEFAULT_SCALE
) -> Float[np.ndarray, "O I"]:
    """W + alpha / r * B A for one PyTorch weight: computed in float32, rounded once to the weight's dtype.

    Raises ValueError if the shapes do not fit.
    """
    a, b = pair.a.astype(np.float32), pair.b.astype(np.float32)
    if weight.shape != (len(b), a.shape[1]):
        raise ValueError(f"LoRA pair of a weight {[len(b), a.shape[1]]} on a weight {list(weight.shape)}")
    b *= np.float32(pair.scale(default_scale))
    result = np.empty_like(weight)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        result[rows] = (weight[rows].astype(np.float32) + b[rows] @ a).astype(weight.dtype)
    return result


def _place(key: str) -> tuple[str, str] | None:
    """(module, "a" | "b" | "alpha") of a LoRA key; a module that the model lacks is returned as spelt."""
    name = _without_prefix(key)
    if match := _SIDE.fullmatch(name):
        side = "a" if match["side"] in ("A", "down") else "b"
    elif match := _ALPHA.fullmatch(name):
        side = "alpha"
    else:
        return None
    return _module(match["module"]), side


def _without_prefix(key: str) -> str:
    return key[match.end() :] if (match := _PREFIX.match(key)) else key


def _module(name: str) -> str:
    """`lora_unet_blocks_0_self_attn_q` -> `blocks.0.self_attn.q`, by the list of linear layers."""
    if not (prefix := _FLAT_PREFIX.match(name)):
        return name
    for pattern in _LINEARS:
        if match := re.fullmatch(pattern.replace(r"\.", "_"), name[prefix.end() :]):
            layer = match.groupdict().get("layer", "")
            return pattern.replace(_LAYER, layer).replace(r"\.", ".")
    return name


def _problem(
    tensors: Mapping[str, Any], module: str, keys: dict[str, str], base: Mapping[str, Sequence[int]] | None
) -> str | None:
    """What is wrong with the tensors of a module, if anything."""
    weight = f"{module}.weight"
    known = weight in base if base is not None else any(re.fullmatch(p, module) for p in _LINEARS)
    if not known:
        return f"the model has no linear layer {module} (key {next(iter(keys.values()))})"
    missing = [side for side in ("a", "b") if side not in keys]
    if missing:
        names = " and ".join({"a": "A (down)", "b": "B (up)"}[side] for side in missing)
        return f"{module} has no matrix {names}"
    a, b = (tuple(tensors[keys[side]].shape) for side in ("a", "b"))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        return f"A {list(a)} and B {list(b)} of {module} are not [r, in] and [out, r] of one rank r"
    if base is not None and tuple(base[weight]) != (b[0], a[1]):
        return f"the pair of {module} is for a weight {[b[0], a[1]]}, the model's is {list(base[weight])}"
    return None
