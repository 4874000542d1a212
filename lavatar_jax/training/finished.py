"""What a training run has made: its averaged weights as one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from lavatar_jax.checkpoints.runs import read_average
from lavatar_jax.errors import UserError
from lavatar_jax.training.state import Params
from lavatar_jax.training.weights import abstract_weights, misfits

Model = TypeVar("Model")


def checked_average(run: Path, wanted: dict[str, Any]) -> Params:
    """The averaged parameters of a run, which must have the names and shapes of `wanted`.

    Raises UserError where they do not, as when `config.json` is of another run, or there is no checkpoint.
    """
    average = read_average(run)
    if wrong := misfits(average, wanted):
        raise UserError(
            f"the checkpoint in {run} is not of the model of its config.json ({len(wrong)} differences, "
            f"first: {wrong[0]}): put the config.json of that training back, or train in another --out"
        )
    return average


def averaged_model(run: Path, make: Callable[[nnx.Rngs], Model]) -> Model:
    """The averaged model of a run; `make` builds such a model. Raises UserError where it is another one."""
    weights = abstract_weights(make)
    average = checked_average(run, weights.params)
    return weights.merge({name: jnp.asarray(value) for name, value in average.items()})
