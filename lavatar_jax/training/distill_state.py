"""Everything that Self-Forcing DMD changes: student, its average, and critic, with what they learn by."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lavatar_jax.parallel import state_shardings
from lavatar_jax.training.bad_steps import Usual
from lavatar_jax.training.dynaforcing import RewardStatistics
from lavatar_jax.training.state import Metrics, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillState:
    """Everything that distillation changes; `average` is the student to evaluate and ship."""

    params: Params
    average: Params
    optimizer: optax.OptState
    critic: Params
    critic_optimizer: optax.OptState
    rewards: RewardStatistics
    usual: Usual  # the critic's loss so far, to know a jump when it comes
    updates: jax.Array  # int32 [], of the student
    report: Metrics  # of the student's latest update, since it does not learn in every step
    step: jax.Array  # int32 []
    seconds: jax.Array  # float32 []
    key: jax.Array  # uint32 key data


def create_distill_state(
    params: Params,
    critic: Params,
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    *,
    steps: int,
    rewards: int,
    seed: int,
    mesh: Mesh | None = None,
) -> DistillState:
    """The state before the first step, split over `mesh` (None: on one device). `steps`: of the sampler."""
    names = ("dmd_gradient_norm", "student_grad_norm", "student_loss", "regression", "reward")

    def create(params: Params, critic: Params) -> DistillState:
        state = DistillState(
            params=params,
            average=params,
            optimizer=optimizers[0].init(params),
            critic=critic,
            critic_optimizer=optimizers[1].init(critic),
            rewards=RewardStatistics.empty(rewards),
            usual=Usual.unknown(),
            updates=jnp.zeros((), jnp.int32),
            report={name: jnp.zeros(()) for name in (*names, *(f"dmd_exit_{step}" for step in range(steps)))},
            step=jnp.zeros((), jnp.int32),
            seconds=jnp.zeros((), jnp.float32),
            key=jax.random.key_data(jax.random.key(seed)),
        )
        # Copies, because donated buffers must not be shared; and no weak types, which would compile again.
        return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), state)

    if mesh is None:
        return create(params, critic)
    shardings = state_shardings(jax.eval_shape(create, params, critic), mesh)
    return jax.jit(create, out_shardings=shardings)(params, critic)
