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
import optax
from jax.sharding import Mesh

from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.parallel import split_samples, state_shardings
from lavatar_jax.training.bad_steps import Usual, judge
from lavatar_jax.training.optim import clip_by_norm

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
    usual: Usual  # the loss so far, to know a jump when it comes
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


def create_state(
    params: Params, optimizer: optax.GradientTransformation, seed: int, *, mesh: Mesh | None = None
) -> TrainState:
    """The state before the first step, split over `mesh` as the rules say (None: on one device).

    Created in place: parameters that are split already are never put together.
    """

    def create(params: Params) -> TrainState:
        return TrainState(
            params=params,
            average=params,
            optimizer=optimizer.init(params),
            usual=Usual.unknown(),
            step=jnp.zeros((), jnp.int32),
            seconds=jnp.zeros((), jnp.float32),
            key=jax.random.key_data(jax.random.key(seed)),
        )

    def copied(params: Params) -> TrainState:
        # Copies, because donated buffers must not be shared; and without weak types, with which the second
        # step would be compiled anew.
        return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), create(params))

    if mesh is None:
        return copied(params)
    shardings = state_shardings(jax.eval_shape(create, params), mesh)
    return jax.jit(copied, out_shardings=shardings)(params)


def release(tree: Any, keep: Any = None) -> None:
    """Free the memory of a tree's arrays, but for those that `keep` has too; nobody may use them any more.

    What a state was made of would otherwise stay as long as the function that made it runs: a whole training.
    """
    kept = {id(leaf) for leaf in jax.tree.leaves(keep)}
    for leaf in jax.tree.leaves(tree):
        if id(leaf) not in kept and not leaf.is_deleted():
            leaf.delete()


Metrics = dict[str, jax.Array]
LossFn = Callable[[Params, Params, Any, jax.Array], tuple[jax.Array, Metrics]]
TrainStep = Callable[[TrainState, Params, Any, jax.Array], tuple[TrainState, Metrics]]
Gradients = Callable[[Params, Params, Any, jax.Array], tuple[tuple[jax.Array, Metrics], Params]]


def in_parts(part: Callable[[Any, Any], tuple[Any, Any]], samples: Any, count: int) -> tuple[Any, Any]:
    """Compute a batch (pytree of [B, ...]) in `count` parts, one after the other.

    So what a part needs in between is in memory once. `part(samples, index) -> (common, own)` of a part's
    samples and its number; the result is the mean of `common`, and `own` [B, ...] of all samples.
    Every part takes every `count`-th sample: each device splits the samples that it has.
    """
    if count == 1:
        return part(samples, 0)

    def one(total: Any, inputs: tuple[Any, jax.Array]) -> tuple[Any, Any]:
        samples, index = inputs
        common, own = part(jax.tree.map(split_samples, samples), index)
        return jax.tree.map(jnp.add, total, common), own

    parts = jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, count, *leaf.shape[1:]), 1, 0), samples)
    shape, _ = jax.eval_shape(part, jax.tree.map(lambda leaf: leaf[0], parts), 0)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
    total, own = jax.lax.scan(one, zero, (parts, jnp.arange(count)))
    own = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), own)
    return jax.tree.map(lambda leaf: leaf / count, total), jax.tree.map(split_samples, own)


def gradients_of(loss_fn: LossFn, accumulate: int = 1) -> Gradients:
    """`(params, frozen, batch, key) -> ((loss, metrics), gradient)`, the means of `accumulate` parts."""
    whole = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        return whole

    def gradients(
        params: Params, frozen: Params, batch: Any, key: jax.Array
    ) -> tuple[tuple[jax.Array, Metrics], Params]:
        keys = jax.random.split(key, accumulate)
        means, _ = in_parts(
            lambda samples, index: (whole(params, frozen, samples, keys[index]), ()), batch, accumulate
        )
        return means

    return gradients


def follow(average: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """The moving average after a step.

    Its decay is at most `(1 + step) / (10 + step)`, so that it forgets the initial weights quickly.
    """
    count = step.astype(jnp.float32)
    keep = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda a, p: a + (1.0 - keep) * (p - a), average, params)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    clip: float = 1.0,
    *,
    accumulate: int = 1,
    spike: float = 0.0,
) -> TrainStep:
    """One optimisation step `(state, frozen, batch, learning_rate) -> (state, metrics)`; donates the state.

    `loss_fn(params, frozen, batch, key) -> (loss, metrics)`; `frozen` is what is not trained (`{}`: nothing).
    The optimizer is built for a learning rate of 1, and the rate is an argument, because a schedule in
    seconds is known to the host only. A bad step (`bad_steps.judge`, with `spike`) changes no parameter and
    has metric `bad` 1: one bad batch must not end a long run.
    """
    gradients = gradients_of(loss_fn, accumulate)

    def step_fn(state: TrainState, frozen: Params, batch: Any, rate: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (loss, metrics), gradient = gradients(state.params, frozen, batch, key)
        norm = optax.tree.norm(gradient)
        good, usual = judge(state.usual, loss, norm, spike)
        gradient = jax.tree.map(lambda g: jnp.where(good, g, 0.0), clip_by_norm(gradient, norm, clip))
        updates, opt_state = optimizer.update(gradient, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: jnp.where(good, p + rate * u, p), state.params, updates)
        opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), opt_state, state.optimizer)
        after = dataclasses.replace(
            state,
            params=params,
            average=follow(state.average, params, state.step, ema_decay),
            optimizer=opt_state,
            usual=usual,
            step=state.step + 1,
        )
        return after, {"loss": loss, "grad_norm": norm, "bad": 1.0 - good, **metrics}

    return jax.jit(step_fn, donate_argnums=0)
