"""Folders of training runs with any averaged parameters, without the training."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lavatar_jax.checkpoints.runs import RunCheckpoints
from lavatar_jax.training.optim import OptimConfig, make_optimizer
from lavatar_jax.training.run import Run, write_config
from lavatar_jax.training.state import create_state
from lavatar_jax.training.weights import LoraConfig, abstract_weights


def write_run(
    run: Run, params: Mapping[str, Any], *, step: int = 0, metrics: Mapping[str, float] | None = None
) -> Path:
    """`config.json` and a checkpoint, as after a step; `metrics`: what its evaluation said."""
    write_config(run)
    params = {name: jnp.asarray(value) for name, value in params.items()}
    state = create_state(params, make_optimizer(params, config=OptimConfig(kind="adamw")), 0)
    state = dataclasses.replace(state, step=jnp.int32(step))
    config = dataclasses.replace(run.checkpoint, asynchronous=False)
    checkpoints = RunCheckpoints(Path(run.out) / "checkpoints", config)
    checkpoints.save(state, {}, metrics)
    checkpoints.close()
    return Path(run.out)


def random_adapters(make: Callable[[nnx.Rngs], Any], lora: LoraConfig) -> dict[str, jax.Array]:
    """Adapters that change a model visibly."""
    rng = np.random.default_rng(0)
    shapes = abstract_weights(make, lora).params
    return {name: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32) for name, x in shapes.items()}
