"""Model folders: what `--model` takes.

Either small ones, as trained here (`config.json`, `dit.safetensors`, `vae.safetensors`), or converted ones
(`config.json`, `manifest.json`, an orbax checkpoint for each component, `tokenizer/`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
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
from lavatar_jax.config import VAEConfig
from lavatar_jax.errors import UserError
from lavatar_jax.files import replacing, write_errors
from lavatar_jax.models.avatar import Avatar, AvatarConfig
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.umt5 import UMT5Encoder
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.models.wav2vec2 import Wav2Vec2

CONFIG, DIT, VAE = "config.json", "dit.safetensors", "vae.safetensors"
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"  # of converted folders
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
    with replacing(path) as part:
        save_file(tensors, part)


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
    # Converted by numpy: jax would compile a program for each shape.
    filled = [jax.device_put(tensors[name].astype(dtype)) for name in leaves]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), filled)


def check_replaceable(folder: Path) -> None:
    """Raises UserError unless `folder` is new, empty, or a model folder that `save_model_folder` wrote: what
    else is there is not replaced by a model."""
    with write_errors(folder):
        if not os.path.lexists(folder):
            return
        found = list(folder.iterdir()) if folder.is_dir() else [folder]
    written = all(path.is_file() for path in found) and {CONFIG, DIT, VAE} <= {path.name for path in found}
    if found and not written:
        raise UserError(f"{folder} holds other things than a small model; give another --out, or remove it")


def save_model_folder(folder: Path, avatar: Avatar, dtype: Any = np.float16) -> None:
    """Write a model folder; a model folder that stood there is replaced only when the new one is complete.

    Raises UserError where something else stands there, or it cannot be written.
    """
    check_replaceable(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    with write_errors(folder):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_params(temporary / DIT, avatar.dit, dtype)
            save_params(temporary / VAE, avatar.vae, dtype)
            (temporary / CONFIG).write_text(config_to_json(avatar.config))
            if folder.exists():
                for path in folder.iterdir():  # a model card and the like stay
                    if not (temporary / path.name).exists():
                        shutil.copy2(path, temporary)
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def model_folder(name: str | Path) -> Path:
    """The folder of a shipped model's name ("tiny"), or of a path. Raises UserError if there is none."""
    shipped, folder = SHIPPED / str(name), Path(name)
    is_word = bool(re.fullmatch(r"\w[\w.-]*", str(name)))  # ./tiny is a path
    if is_word and os.path.isdir(shipped):  # which says no where a name is too long
        return shipped
    if not os.path.isdir(folder):
        _refuse_partial(folder.with_name(folder.name + ".partial"))
        names = ", ".join(sorted(path.name for path in SHIPPED.glob("*/")))
        raise UserError(f"{name}: no such model folder, and no shipped model of that name (shipped: {names})")
    return folder


def load_config(folder: Path) -> AvatarConfig:
    """Read and check `config.json` of a model folder, and that the weights are there.

    Raises UserError for what is missing, damaged, or not converted yet (completely).
    """
    _refuse_partial(folder)
    if is_published(folder):
        raise UserError(
            f"{folder} holds published PyTorch weights; convert them first: "
            f"python tools/convert.py --wan {folder} --out {folder.absolute().name}-jax"
        )
    converted = is_converted(folder)
    for name in (CONFIG, MANIFEST) if converted else (CONFIG, DIT, VAE):
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
    config = config_from_dict(AvatarConfig, values)
    if converted:
        _check_converted(folder, config)
    return config


def _check_converted(folder: Path, config: AvatarConfig) -> None:
    """That the conversion was completed, and gave everything that the configuration needs."""
    # Imported only here: it needs orbax, which takes half a second, and small models do without.
    from lavatar_jax.checkpoints.manifest import read_manifest

    manifest = read_manifest(folder)
    if manifest.complete is not True:
        raise UserError(f"{folder}: its conversion was not completed; convert the checkpoint again")
    parts = ["dit", "vae", *(name for name in ("text", "speech") if getattr(config, name))]
    for part in parts:
        if part not in manifest.components:
            raise UserError(f"{folder / MANIFEST} lists no {part}, which {CONFIG} asks for; convert again")
    for name in [*parts, TOKENIZER] if config.text else parts:
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name}: the model folder lacks this folder; convert again")


def is_converted(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or (folder / "dit").is_dir()


def is_published(folder: Path) -> bool:
    """Whether a folder is one of the PyTorch checkpoints that conversion starts from."""
    return any(folder.glob("*.safetensors.index.json")) or any(folder.glob("*.pth"))


def _refuse_partial(folder: Path) -> None:
    if folder.name.endswith(".partial") and os.path.isdir(folder):
        raise UserError(
            f"{folder} is a conversion that was not finished; run the same command again (tools/convert.py, "
            "or tools/package_model.py), it goes on where it stopped"
        )


def load_model_folder(name: str | Path, dtype: Any = None) -> Avatar:
    """Load a shipped model by name or a model folder by path, without its text encoder.

    `dtype`: of the parameters; None: float32 where trained here, as converted otherwise (8-bit weights stay).
    """
    folder = model_folder(name)
    config = load_config(folder)
    if is_converted(folder):
        dit = _restore_part(folder, "dit", lambda: CausalDiT(config.dit, rngs=nnx.Rngs(0)), dtype)
    else:
        dit = load_params(folder / DIT, lambda: CausalDiT(config.dit, rngs=nnx.Rngs(0)), dtype or jnp.float32)
    vae, speech = load_encoders(folder, config, dtype)
    return Avatar(config=config, dit=dit, vae=vae, speech=speech)


def load_vae(folder: Path, config: VAEConfig, dtype: Any = None) -> CausalVAE:
    """The VAE of a model folder alone; `config`: its own, perhaps with other statistics of the latents.

    Raises UserError if it is damaged."""

    def make() -> CausalVAE:
        return make_vae(config, rngs=nnx.Rngs(0))

    if is_converted(folder):
        return _restore_part(folder, "vae", make, dtype)
    return load_params(folder / VAE, make, dtype or jnp.float32)


def load_encoders(folder: Path, config: AvatarConfig, dtype: Any = None) -> tuple[CausalVAE, Wav2Vec2 | None]:
    """The VAE and, where the model has one, the speech encoder of a model folder: all that preparing data
    needs. Raises UserError if one is damaged."""
    vae = load_vae(folder, config.vae, dtype)
    if (heard := config.speech) is None:
        return vae, None
    return vae, _restore_part(folder, "speech", lambda: Wav2Vec2(heard, rngs=nnx.Rngs(0)), dtype)


def load_text_encoder(folder: Path, config: AvatarConfig) -> UMT5Encoder:
    """The component that `load_model_folder` leaves out, in the dtype it was converted to.

    Raises UserError if it is damaged, ValueError if the model has none.
    """
    settings = config.text
    if settings is None:
        raise ValueError(f"{config.name} has no text encoder")
    return _restore_part(folder, "text", lambda: UMT5Encoder(settings, rngs=nnx.Rngs(0)), None)


def _restore_part(folder: Path, component: str, make: Callable[[], Model], dtype: Any) -> Model:
    from lavatar_jax.checkpoints.orbax_store import restore_component

    return restore_component(folder, component, jax.eval_shape(make), dtype=dtype)
