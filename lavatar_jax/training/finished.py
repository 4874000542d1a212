"""What a training run has made: its averaged weights as one model, adapters merged into what they were on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lavatar_jax import lora
from lavatar_jax.checkpoints.runs import read_average, result_time
from lavatar_jax.checkpoints.sources import read_json
from lavatar_jax.checkpoints.store import config_from_dict
from lavatar_jax.errors import UserError
from lavatar_jax.parallel import MeshConfig, train_mesh
from lavatar_jax.training.precision import dtype_of
from lavatar_jax.training.state import Params
from lavatar_jax.training.weights import LoraConfig, abstract_weights, initial_weights, misfits, plain_name

Model = TypeVar("Model")


def lora_of(config: dict[str, Any]) -> LoraConfig:
    """The adapters of a run by its `config.json`; rank 0: it trained all parameters."""
    return config_from_dict(LoraConfig, config.get("lora", {}))


def dit_run(run: Path) -> dict[str, Any]:
    """`config.json` of a run that trained a transformer. Raises UserError for what is none."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{run} is not a run of stage 1 or 2: {path} is missing")
    values = read_json(path)
    if "layers" not in values.get("model", {}):
        raise UserError(
            f"{run} is not a run of stage 1 or 2: {path} tells of no transformer that was trained"
        )
    return values


def checked_average(run: Path, wanted: dict[str, Any]) -> Params:
    """The averaged parameters of a run, which must have the names and shapes of `wanted`.

    Raises UserError where they do not, as when `config.json` is of another run, or there is no checkpoint.
    """
    average = read_average(run)
    check_parameters(run, average, wanted)
    return average


def check_parameters(run: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError unless what a run's checkpoint has are the names and shapes of its `config.json`."""
    if wrong := misfits(found, wanted):
        raise UserError(
            f"the checkpoint in {run} is not of the model of its config.json ({len(wrong)} differences, "
            f"first: {wrong[0]}): put the config.json of that training back, or train in another --out"
        )


def averaged_model(run: Path, config: dict[str, Any], make: Callable[[nnx.Rngs], Model]) -> Model:
    """The averaged model of a run in float32; `config` is its `config.json`, `make` builds such a model.

    Adapters are merged into the base that they were trained on, in the precision that it had then. Raises
    UserError where the checkpoint is of another model, or the base cannot be had.
    """
    adapters = dataclasses.replace(lora_of(config), init=None)
    weights = abstract_weights(make, adapters)
    average = {name: jnp.asarray(x) for name, x in checked_average(run, weights.params).items()}
    if not adapters.rank:
        return weights.merge(average)
    if (init := config.get("init")) is None:
        raise UserError(f"{run} has adapters on random weights (its init is null): they cannot be merged")
    if (then := config.get("origins", {}).get("init")) is not None and result_time(Path(init)) != then:
        raise UserError(
            f"{run} has adapters on {init} as it was then, which is gone, is another training now, or has "
            "gone on since"
        )
    try:
        mesh = train_mesh(MeshConfig(data=1), jax.local_devices()[:1])
        base = initial_weights(make, mesh, init=init, seed=0).params
    except UserError as error:
        raise UserError(f"{run} has adapters on {init}, which cannot be read: {error}") from None

    def rounded(name: str) -> jax.Array:
        plain = plain_name(name)
        return base[plain].astype(dtype_of(plain, adapters.base)).astype(jnp.float32)

    return lora.merge(weights.merge(average, {name: rounded(name) for name in weights.frozen}))
