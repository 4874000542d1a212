"""The weights that a run starts from: random, of another run, of a model folder; all trained, or adapters.

Abstract first, then where each parameter lives, then its numbers: no device ever holds the whole of a model
that is split.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lavatar_jax import lora
from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.manifest import read_manifest
from lavatar_jax.checkpoints.orbax_store import restore_component, restore_leaves, stored_leaves
from lavatar_jax.checkpoints.runs import read_average
from lavatar_jax.checkpoints.store import is_converted, load_params, model_folder
from lavatar_jax.errors import UserError
from lavatar_jax.parallel import put_tree, state_shardings
from lavatar_jax.quant import QuantizedWeight, dotted
from lavatar_jax.training.precision import Stored, dtype_of
from lavatar_jax.training.state import Merge, Params, split_model

Model = TypeVar("Model")
Make = Callable[[nnx.Rngs], Model]
_ADAPTER = re.compile(r".*\.weight\.[ab]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train low-rank adapters and nothing else; rank 0: train all parameters.

    `targets`: dotted paths of the weights, a regular expression. `base`: dtype that the others are kept in,
    where the model does not need float32. `init`: another run, or a folder that was converted with
    --keep-lora, whose adapters to start from.
    """

    rank: int = 0
    alpha: float = 64.0
    targets: str = lora.TARGETS
    base: Stored = "bfloat16"
    init: str | None = None


class Weights(NamedTuple, Generic[Model]):
    """What is trained, what is not, by dotted name, and how both make a model."""

    params: Params
    frozen: Params
    merge: Merge[Model]


def abstract_weights(make: Make[Model], adapters: LoraConfig | None = None, seed: int = 0) -> Weights[Model]:
    """Shapes and dtypes only: nothing is computed."""
    adapters = adapters or LoraConfig()
    leaves, merge = split_model(jax.eval_shape(_builder(make, adapters, seed)))
    trained = {name for name in leaves if not adapters.rank or _ADAPTER.fullmatch(name)}
    params = {name: leaf for name, leaf in leaves.items() if name in trained}
    frozen: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype_of(plain_name(name), adapters.base))
        for name, leaf in leaves.items()
        if name not in trained
    }
    return Weights(params, frozen, merge)


def initial_weights(
    make: Make[Model],
    mesh: Mesh,
    *,
    init: str | None,
    seed: int,
    component: Literal["dit", "vae"] = "dit",
    adapters: LoraConfig | None = None,
    adjust: Callable[[Params], Params] | None = None,
) -> Weights[Model]:
    """The weights of a run before its first step, split over `mesh` as `parallel.param_spec` says.

    `make` builds a model with random weights, which `adjust` may change; `init` as in `run.Run`; a
    model folder gives its `component`. Raises UserError when `init` is nothing to start from, or of another
    model.
    """
    adapters = adapters or LoraConfig()
    abstract = abstract_weights(make, adapters, seed)
    wanted = {**abstract.frozen, **abstract.params}
    shardings = state_shardings(wanted, mesh)
    found: Params = {}
    if init is not None:
        base = jax.eval_shape(lambda: make(nnx.Rngs(seed)))
        places = {plain_name(name): place for name, place in shardings.items()}
        stored = _checked(init, _read(init, base, places, make, component), param_paths(base))
        found = {name: stored[plain_name(name)] for name in wanted if plain_name(name) in stored}
    if adapters.init is not None:
        found |= _checked(adapters.init, _read_adapters(adapters.init, adapters), abstract.params)
    build = _builder(make, adapters, seed)

    def settle(found: Params) -> Params:
        fresh = {} if len(found) == len(wanted) else param_paths(build())
        if fresh and adjust is not None:
            fresh = adjust(fresh)
        values = {**fresh, **found}
        return {name: values[name].astype(leaf.dtype) for name, leaf in wanted.items()}

    found = put_tree(found, {name: shardings[name] for name in found})
    values = jax.jit(settle, out_shardings=shardings)(found)
    params = {name: values[name] for name in abstract.params}
    return Weights(params, {name: values[name] for name in abstract.frozen}, abstract.merge)


def fresh_adapters(make: Make[Model], mesh: Mesh, *, seed: int, adapters: LoraConfig) -> Params:
    """Adapters as they are before the first step, split over `mesh`, without the weights that they are on."""
    wanted = abstract_weights(make, adapters, seed).params
    build = _builder(make, adapters, seed)

    def settle() -> Params:
        fresh = param_paths(build())  # of which what is not returned is never computed
        return {name: fresh[name].astype(leaf.dtype) for name, leaf in wanted.items()}

    return jax.jit(settle, out_shardings=state_shardings(wanted, mesh))()


def _builder(make: Make[Model], adapters: LoraConfig, seed: int) -> Callable[[], Model]:
    def build() -> Model:
        model = make(nnx.Rngs(seed))
        if not adapters.rank:
            return model
        key = jax.random.fold_in(jax.random.key(seed), 1)
        try:
            return lora.add_adapters(
                model, key, rank=adapters.rank, alpha=adapters.alpha, targets=adapters.targets
            )
        except (ValueError, re.error) as error:
            raise UserError(f"--lora.targets {adapters.targets}: {error}") from None

    return build


def plain_name(name: str) -> str:
    """The name that a weight has in a model without adapters."""
    return name.removesuffix(".base")


def _read(
    init: str, base: Any, shardings: dict[str, NamedSharding], make: Make[Any], component: str
) -> Params:
    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return shardings.get(plain_name(path.removesuffix(".values")), _anywhere(shardings))

    if (Path(init) / "checkpoints").is_dir():
        return read_average(Path(init), place)
    folder = model_folder(init)
    if not is_converted(folder):
        return param_paths(load_params(folder / f"{component}.safetensors", lambda: make(nnx.Rngs(0))))
    stored = restore_component(folder, component, base, place)
    return param_paths(lora.merge(_dequantized(stored, shardings)))


def _read_adapters(place: str, wanted: LoraConfig) -> Params:
    """Of a run, or those that a converted folder keeps, as they are at the factor alpha / r of `wanted`."""
    if not is_converted(Path(place)):
        return _scaled(read_average(Path(place)), _scale_of_run(Path(place)), wanted)
    kept = read_manifest(Path(place)).lora
    if kept is None or kept["merged"]:
        raise UserError(
            f"--lora.init {place} has no adapters of its own: convert it with --lora, --keep-lora"
        )
    leaves = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        for name, leaf in stored_leaves(Path(place) / "dit").items()
        if _ADAPTER.fullmatch(name)
    }
    ranks = {leaf.shape[-1] for name, leaf in leaves.items() if name.endswith(".a")}
    if ranks != {wanted.rank}:
        raise UserError(
            f"--lora.init {place} has adapters of rank {min(ranks)}: give --lora.rank {min(ranks)}"
        )
    found = restore_leaves(Path(place) / "dit", leaves)
    return _scaled(found, kept["scale"], wanted)


def _scale_of_run(run: Path) -> float | None:
    """The factor alpha / r of a run's adapters; None where it does not tell."""
    path = run / "config.json"
    told = json.loads(path.read_text()).get("lora", {}) if path.is_file() else {}
    return told["alpha"] / told["rank"] if told.get("rank") else None


def _scaled(found: Params, scale: float | None, wanted: LoraConfig) -> Params:
    """Adapters that say at the factor of `wanted` what they said at `scale` (None: the same)."""
    factor = 1.0 if scale is None else scale / (wanted.alpha / wanted.rank)
    if factor == 1.0:
        return found
    return {name: factor * leaf if name.endswith(".b") else leaf for name, leaf in found.items()}


def _dequantized(model: Model, shardings: dict[str, NamedSharding]) -> Model:
    """The model with the numbers that its 8-bit weights stand for, in float32, where they belong."""

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedWeight):
            return leaf
        where = shardings[plain_name(dotted(path))]
        return jax.jit(QuantizedWeight.dequantize, out_shardings=where)(leaf)

    return jax.tree_util.tree_map_with_path(
        convert, model, is_leaf=lambda node: isinstance(node, QuantizedWeight)
    )


def _anywhere(shardings: dict[str, NamedSharding]) -> NamedSharding:
    """For parts that belong to no parameter alone: on every device."""
    return NamedSharding(next(iter(shardings.values())).mesh, jax.sharding.PartitionSpec())


def misfits(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names that are missing, unknown or of another shape."""
    wrong = sorted(found.keys() ^ wanted.keys())
    return wrong + [name for name in found.keys() & wanted.keys() if found[name].shape != wanted[name].shape]


def _checked(source: str, found: Params, wanted: dict[str, Any]) -> Params:
    if wrong := misfits(found, wanted):
        raise UserError(
            f"{source} holds weights of another model ({len(wrong)} differences, first: {wrong[0]}): give a "
            "run of the same --model"
        )
    return {name: jnp.asarray(value) for name, value in found.items()}
