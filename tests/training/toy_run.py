"""Small models to train (two layers, or a transformer), and batches that are a function of their number."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lavatar_jax.checkpoints.runs import CheckpointConfig
from lavatar_jax.data.batches import rows_of_part
from lavatar_jax.models.dit_forward import train_forward
from lavatar_jax.models.layers import Linear
from lavatar_jax.parallel import STACKED, MeshConfig, train_mesh
from lavatar_jax.training.logs import LOG, LogConfig, read_log
from lavatar_jax.training.loop import LoopConfig, fit
from lavatar_jax.training.optim import OptimConfig, make_optimizer
from lavatar_jax.training.precision import compute_in
from lavatar_jax.training.state import LossFn, Metrics, Params, TrainState, create_state, make_train_step
from lavatar_jax.training.weights import LoraConfig, Weights, initial_weights
from tests.tiny import random_dit, tiny_config

BATCH, FRAMES = 8, 3
CONFIG = tiny_config()


class Net(nnx.Module):
    """Two layers: what loops and checkpoints do does not depend on the model, and this one compiles fast."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner, self.outer = Linear(6, 8, rngs=rngs), Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(jnp.tanh(self.inner(x)))


class Batches:
    """Endless. A state is the number of batches that were taken."""

    def __init__(
        self, poison: Callable[[int, dict[str, Any]], None] | None = None, *, dit: bool = False
    ) -> None:
        self.taken, self.poison, self.dit = 0, poison, dit
        self.rows = slice(None)

    def __next__(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(self.taken)
        c = CONFIG
        shapes: dict[str, tuple[int, ...]] = {"x": (6,), "y": (4,)}
        if self.dit:
            shapes = {
                "latent": (FRAMES, 4, 4, c.latent_channels),
                "reference": (1, 4, 4, c.latent_channels),
                "audio": (1, c.audio_layers, c.audio_dim, 4 * FRAMES),
                "text": (c.text_len, c.text_dim),
                "t": (FRAMES,),
            }
        batch: dict[str, Any] = {
            name: random.normal(size=(BATCH, *shape)).astype(np.float32) for name, shape in shapes.items()
        }
        batch["record"] = (100 * self.taken + np.arange(BATCH)).astype(np.int32)
        if self.poison is not None:
            self.poison(self.taken, batch)
        self.taken += 1
        return {name: value[self.rows] for name, value in batch.items()}

    def take_part(self, part: int, parts: int) -> None:
        self.rows = rows_of_part(BATCH, part, parts)

    def get_state(self) -> dict[str, int]:
        return {"taken": self.taken}

    def set_state(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def loss_of(weights: Weights[Any], precision: Any, dit: bool) -> LossFn:
    merge = compute_in(weights.merge, precision)

    def loss(params: Params, frozen: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        model = merge(params, frozen)
        if not dit:
            return jnp.mean(jnp.square(model(batch["x"]) - batch["y"])), {}
        flow = train_forward(
            model,
            batch["latent"],
            500.0 + 100.0 * batch["t"],
            text_BSE=batch["text"],
            audio=batch["audio"],
            ref_B1HWC=batch["reference"],
        )
        return jnp.mean(jnp.square(flow - batch["latent"])), {}

    return loss


def begin(
    mesh: Mesh,
    *,
    dit: bool = False,
    lora: LoraConfig | None = None,
    accumulate: int = 1,
    spike: float = 0.0,
    precision: Any = "float32",
) -> tuple[Any, TrainState, Any]:
    """-> (step function, first state, what is frozen)."""

    whole = random_dit(CONFIG) if dit else None

    def make(rngs: nnx.Rngs) -> Any:
        return whole if dit else Net(rngs)

    weights = initial_weights(make, mesh, init=None, seed=0, adapters=lora)
    optimizer = make_optimizer(weights.params, stacked=STACKED, config=OptimConfig(kind="adamw"))
    loss = loss_of(weights, precision, dit)
    step_fn = make_train_step(loss, optimizer, 0.9, accumulate=accumulate, spike=spike)
    return step_fn, create_state(weights.params, optimizer, 0, mesh=mesh), weights.frozen


def train(
    out: Path,
    steps: int,
    mesh: Mesh,
    *,
    batches: Batches | None = None,
    told: Callable[[int], None] = lambda step: None,
    save_seconds: float = 1e9,
    loop: LoopConfig | None = None,
    checkpoint: CheckpointConfig | None = None,
    begun: Any = None,
    **options: Any,
) -> TrainState:
    """`told(step)` runs before each checkpoint: every step's with `save_seconds` 0."""
    step_fn, state, frozen = begin(mesh) if begun is None else begun
    config = loop or LoopConfig(learning_rate=0.01, warmup=0.0, batch=BATCH)
    config = dataclasses.replace(config, steps=steps, log_every=1, checkpoint_seconds=save_seconds)

    def evaluate(state: TrainState) -> dict[str, float]:
        told(int(state.step))
        return {"step_again": float(state.step)}

    log = LogConfig(tensorboard=False, report=False)
    options = {"evaluate": evaluate, "checkpoint": checkpoint, "log": log, **options}
    return fit(step_fn, state, frozen, batches or Batches(), config, out, mesh=mesh, **options)


def losses(out: Path) -> list[float]:
    """Of all steps, as logged."""
    return [line["loss"] for line in read_log(out / LOG) if "step" in line]


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    return train_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
