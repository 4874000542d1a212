"""Model folders (`config.json`, `dit.safetensors`, `vae.safetensors`): what `--model` takes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.errors import UserError
from lavatar_jax.models.avatar import Avatar, AvatarConfig
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.vae import make_vae

CONFIG, DIT, VAE = "config.json", "dit.safetensors", "vae.safetensors"
SHIPPED = Path(__file__).parents[1] / "weights"  # models that come with the package, by name
Config = TypeVar("Config")
Model = TypeVar("Model")


def config_to_json(config: Any) -> str:
    """Any of the configuration dataclasses as readable JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict` after a trip through JSON (lists become tuples).

    Raises UserError for unknown names and values that the configuration refuses.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{CONFIG}: unknown {kind.__name__} settings {', '.join(unknown)}")
    try:
        return kind(**{name: _restore(hints[name], value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{CONFIG}: {kind.__name__}: {error}") from None


def _restore(hint: Any, value: Any) -> Any:
    if isinstance(value, dict):
        options = (
            typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        )
        kind: Any = next(option for option in options if dataclasses.is_dataclass(option))
        return config_from_dict(kind, value)
    return tuple(_restore(None, item) for item in value) if isinstance(value, list) else value


def save_params(path: Path, model: Any, dtype: Any = np.float16) -> None:
    """Parameters under their dotted paths, floats in `dtype` (None: as they are); written, then renamed."""
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in param_paths(model).items()}
    if dtype is not None:
        tensors = {name: t.astype(dtype) if t.dtype.kind == "f" else t for name, t in tensors.items()}
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def load_params(path: Path, make: Callable[[], Model], dtype: Any = jnp.float32) -> Model:
    """Fill the model that `make` would initialise. Raises UserError naming the file and what is wrong."""
    if not path.is_file():
        raise UserError(f"{path}: the model folder lacks this file; copy it there or build the model again")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError):
        raise UserError(f"{path} is damaged (not a complete safetensors file); copy it again") from None
    abstract = jax.eval_shape(make)
    leaves = param_paths(abstract)
    problems = [f"{name} is missing" for name in leaves if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in leaves]
    problems += [
        f"{name} has shape {list(tensors[name].shape)} instead of {list(leaf.shape)}"
        for name, leaf in leaves.items()
        if name in tensors and tensors[name].shape != leaf.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more problems" if len(problems) > 3 else ""
        raise UserError(f"{path} does not fit {CONFIG}: {'; '.join(problems[:3])}{more}")
    filled = [jnp.asarray(tensors[name], dtype) for name in leaves]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), filled)


def save_model_folder(folder: Path, avatar: Avatar, dtype: Any = np.float16) -> None:
    """Write a model folder; a folder that stood there is replaced only when the new one is complete."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_params(temporary / DIT, avatar.dit, dtype)
    save_params(temporary / VAE, avatar.vae, dtype)
    (temporary / CONFIG).write_text(config_to_json(avatar.config))
    if folder.exists():
        for path in folder.iterdir():  # a model card and the like stay
            if path.is_file() and not (temporary / path.name).exists():
                shutil.copy2(path, temporary)
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def model_folder(name: str | Path) -> Path:
    """The folder of a shipped model's name ("tiny"), or of a path. Raises UserError if there is none."""
    shipped, folder = SHIPPED / str(name), Path(name)
    if shipped.is_dir():
        return shipped
    if not folder.is_dir():
        names = ", ".join(sorted(path.name for path in SHIPPED.glob("*/")))
        raise UserError(f"{name}: no such model folder, and no shipped model of that name (shipped: {names})")
    return folder


def load_config(folder: Path) -> AvatarConfig:
    """Read and check `config.json` of a model folder, and that the weights are there."""
    for name in (CONFIG, DIT, VAE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: the model folder lacks this file; copy it there or build it again"
            )
    try:
        values = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is not valid JSON ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder / CONFIG} must hold a JSON object with dit, vae and sampling settings")
    return config_from_dict(AvatarConfig, values)


def load_model_folder(name: str | Path, dtype: Any = jnp.float32) -> Avatar:
    """Load a shipped model by name or a model folder by path."""
    folder = model_folder(name)
    config = load_config(folder)
    return Avatar(
        config=config,
        dit=load_params(folder / DIT, lambda: CausalDiT(config.dit, rngs=nnx.Rngs(0)), dtype),
        vae=load_params(folder / VAE, lambda: make_vae(config.vae, rngs=nnx.Rngs(0)), dtype),
    )
