"""Folders of training runs with any averaged parameters, without the training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lavatar_jax.checkpoints.runs import CheckpointConfig, RunCheckpoints
from lavatar_jax.training.optim import OptimConfig, make_optimizer
from lavatar_jax.training.run import Run, write_config
from lavatar_jax.training.state import create_state


def write_run(run: Run, params: Mapping[str, Any]) -> Path:
    """`config.json` and a checkpoint, as after step 0."""
    write_config(run)
    params = {name: jnp.asarray(value) for name, value in params.items()}
    state = create_state(params, make_optimizer(params, config=OptimConfig(kind="adamw")), 0)
    checkpoints = RunCheckpoints(Path(run.out) / "checkpoints", CheckpointConfig(asynchronous=False))
    checkpoints.save(state, {})
    checkpoints.close()
    return Path(run.out)
