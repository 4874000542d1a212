"""Everything that training changes, as one pytree of named arrays.

Parameters are a flat dict from dotted names (`blocks.attn.q.weight`) to arrays, so that the optimizer,
the average, checkpoints and the shipped safetensors files all speak of the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lavatar_jax.checkpoints.convert import param_paths

Params = dict[str, jax.Array]
Model = TypeVar("Model")
Model_co = TypeVar("Model_co", covariant=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """`seconds` is the training time so far, without compilation; it drives time-based schedules."""

    params: Params
    average: Params  # exponential moving average of params: the weights to evaluate and ship
    optimizer: optax.OptState
    step: jax.Array  # int32 []
    seconds: jax.Array  # float32 []
    key: jax.Array  # uint32 key data


class Merge(Protocol[Model_co]):
    """Puts a module together from the parameters that are trained and those that are not."""

    def __call__(self, params: Params, frozen: Params | None = None, /) -> Model_co: ...


def split_model(model: Model) -> tuple[Params, Merge[Model]]:
    """Take a module apart into named arrays; the second result puts it together again.

    Its two dictionaries share the names between them in any way: all in the first, or adapters there and the
    rest in the second.
    """
    leaves = param_paths(model)
    structure = jax.tree.structure(model)

    names = tuple(leaves)

    def merge(params: Params, frozen: Params | None = None, /) -> Model:
        values = {**(frozen or {}), **params}
        return jax.tree_util.tree_unflatten(structure, [values[name] for name in names])

    return leaves, merge


def create_state(params: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    state = TrainState(
        params=params,
        average=params,
        optimizer=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        seconds=jnp.zeros((), jnp.float32),
        key=jax.random.key_data(jax.random.key(seed)),
    )
    # Copies, because donated buffers must not be shared; by way of numpy, which has no weak types: with them
    # the second step would be compiled anew.
    return jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), state)


Metrics = dict[str, jax.Array]
LossFn = Callable[[Params, Params, Any, jax.Array], tuple[jax.Array, Metrics]]


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, ema_decay: float, clip: float = 1.0
) -> Callable[[TrainState, Params, Any, jax.Array], tuple[TrainState, Metrics]]:
    """One optimisation step `(state, frozen, batch, learning_rate) -> (state, metrics)`; donates the state.

    `loss_fn(params, frozen, batch, key) -> (loss, metrics)`; `frozen` is what is not trained (`{}`: nothing).
    The optimizer is built for a learning rate of 1, and the rate is an argument, because a schedule in
    seconds is known to the host only. The average uses `min(ema_decay, (1 + step) / (10 + step))`, so that it
    forgets the initial weights quickly.
    """

    def step_fn(state: TrainState, frozen: Params, batch: Any, rate: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, batch, key)
        norm = optax.tree.norm(grads)
        # A step whose gradient is not finite is skipped: one bad batch must not end a long run.
        scale = jnp.where(jnp.isfinite(norm), jnp.minimum(1.0, clip / (norm + 1e-9)), 0.0)
        grads = jax.tree.map(lambda g: jnp.where(scale > 0, g * scale, 0.0), grads)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), state.average, params)
        state = dataclasses.replace(
            state, params=params, average=average, optimizer=opt_state, step=state.step + 1
        )
        return state, {"loss": loss, "grad_norm": norm, **metrics}

    return jax.jit(step_fn, donate_argnums=0)
