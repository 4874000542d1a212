"""One step of Self-Forcing DMD: stream a clip, teach the critic on it, and now and then the student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from lavatar_jax.config import SamplingConfig
from lavatar_jax.errors import UserError
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.parallel import state_shardings
from lavatar_jax.training import dmd
from lavatar_jax.training.bad_steps import Usual, judge
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.dynaforcing import (
    DynaConfig,
    Reward,
    RewardStatistics,
    check_starts,
    draw_starts,
    reward_weights,
    update_statistics,
)
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.optim import clip_by_norm
from lavatar_jax.training.scores import Batch, ScoreConfig, make_denoiser, make_judges, pose_of
from lavatar_jax.training.self_forcing import (
    Rollout,
    SelfForcingConfig,
    denoised_range,
    draw_exits,
    learns,
    replay_gradient,
    roll_out,
)
from lavatar_jax.training.state import Metrics, Params, follow
from lavatar_jax.training.student import begin_cache, block_inputs, blocks_of, clip_of, make_predict


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How student and critic learn. `learning_rate` of the loop is the student's."""

    critic_rate: float = 1e-3  # peak learning rate of the critic, on the loop's schedule
    update_ratio: int = 5  # critic steps for each step of the student
    critic_warmup: int = 0  # steps before the student first learns
    mouth_weight: float = 1.0  # of the student's gradient where the mouth is
    run_in: int = 0  # blocks streamed before the clip, to the end of another clip's voice, and not judged
    regression: float = 0.0  # pull of samples that started from noised truth towards the truth


StepFn = Callable[["DistillState", dict[str, Any], Batch, Array], tuple["DistillState", Metrics]]


class Roles(NamedTuple):
    """How the three networks are put together: two of (trained parameters, frozen), the teacher of frozen."""

    student: Callable[[Params, Params], CausalDiT]
    critic: Callable[[Params, Params], CausalDiT]
    teacher: Callable[[Params], CausalDiT]


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


def keep_good(good: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)


def make_distill_step(
    roles: Roles,
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    *,
    sampling: SamplingConfig,
    rollout: SelfForcingConfig,
    score: ScoreConfig,
    loss: DMDConfig,
    dyna: DynaConfig,
    config: DistillConfig,
    rewards: Sequence[Reward] = (),
    train: LoopConfig,
    clip: float,
) -> StepFn:
    """`step_fn(state, frozen, batch, rate) -> (state, metrics)`, jitted; donates the state.

    `frozen`: {"params": what the roles share, "rewards": arrays of each reward}. `clip`: of gradient norms.
    Metrics of the student are those of its latest update.

    Raises UserError for settings that do not go together.
    """
    if sampling.history == "noisy" and not rollout.same_exit and rollout.cache == "noisy":
        raise UserError("with a ring for each step all blocks must exit alike: --rollout.same-exit")
    check_starts(dyna, len(rollout.timesteps))
    if config.update_ratio < 1:
        raise UserError(f"--distill.update-ratio must be at least 1, not {config.update_ratio}")
    grid, critic_scale = rollout.grid, config.critic_rate / train.learning_rate
    steps = len(rollout.timesteps)
    ranges = jnp.array([denoised_range(step, rollout) for step in range(steps)], jnp.int32)

    def stream(state: DistillState, frozen: Params, batch: Batch, key: Array) -> tuple[Rollout, Any, Array]:
        """-> (rollout, its inputs, which samples began from noised truth)."""
        keys = jax.random.split(key, 5)
        dit = roles.student(state.params, frozen)
        frames, lead = dit.config.block_frames, config.run_in * dit.config.block_frames

        def longer(x: Array, count: int, axis: int) -> Array:
            """With the end of another clip in front."""
            if count > x.shape[axis]:
                raise UserError(f"--distill.run-in {config.run_in} is longer than the clips")
            end = jax.lax.slice_in_dim(x, x.shape[axis] - count, x.shape[axis], axis=axis)
            return jnp.concatenate([jnp.roll(end, 1, axis=0), x], axis=axis)

        truth, audio = longer(batch["latent"], lead, 1), longer(batch["audio"], 4 * lead, -1)
        pose = pose_of(dit, batch)
        pose = None if pose is None else longer(pose, lead, 1)
        inputs = block_inputs(dit.config, sampling, audio, (truth.shape[2], truth.shape[3]), keys[0], pose)
        cache = begin_cache(dit, sampling, batch["reference"], batch["text"])
        noise = jax.random.normal(keys[1], truth.shape)
        blocks = truth.shape[1] // frames
        exits = draw_exits(keys[2], blocks, rollout)
        renoise = None
        if rollout.transition == "renoise" or rollout.cache == "context":
            shape = (blocks, steps, truth.shape[0], frames, *truth.shape[2:])
            renoise = jax.random.normal(keys[3], shape)
        hybrid, starts = jnp.zeros(truth.shape[0], bool), None
        if dyna.hybrid:
            starts, hybrid = draw_starts(keys[4], truth.shape[0], jnp.min(exits), steps, dyna)
            # The truth in front of the clip shows somebody else.
            starts = jnp.where(jnp.arange(blocks)[:, None] < config.run_in, 0, starts)
        done = roll_out(
            predict(frozen),
            state.params,
            blocks_of(noise, frames),
            renoise,
            exits,
            inputs,
            cache,
            rollout,
            truth=blocks_of(truth, frames) if dyna.hybrid else None,
            starts=starts,
        )
        return done, inputs, hybrid

    def predict(frozen: Params) -> Any:
        return make_predict(lambda params: roles.student(params, frozen), remat=train.remat)

    def judged_clip(done: Rollout) -> Array:
        return clip_of(done.x0[config.run_in :])

    def draw_noise(key: Array, clip: Array, exit_step: Array) -> tuple[Array, Array]:
        """Noise and timesteps [B, F] at which the judges see the clip."""
        level, noise = jax.random.split(key)
        exit_from, exit_to = ranges[exit_step]
        t = dmd.draw_timestep(level, clip.shape[0], loss, exit_from=exit_from, exit_to=exit_to)
        t_BF = jnp.broadcast_to(dmd.shift_timestep(t, loss)[:, None], clip.shape[:2])
        return jax.random.normal(noise, clip.shape), t_BF

    def critic_loss(
        critic: Params, frozen: Params, batch: Batch, clip: Array, noise: Array, t: Array
    ) -> Array:
        dit = roles.critic(critic, frozen)
        return dmd.critic_loss(
            clip, noise, t, grid, make_denoiser(dit, batch, score, grid, remat=train.remat)
        )

    def student_slope(
        state: DistillState, frozen: dict[str, Any], batch: Batch, clip: Array, hybrid: Array, key: Array,
        exit_step: Array,
    ) -> tuple[Array, RewardStatistics, Metrics]:  # fmt: skip
        """Derivative of the student's loss by its clip."""
        teacher, critic = roles.teacher(frozen["params"]), roles.critic(state.critic, frozen["params"])
        noise, t_BF = draw_noise(key, clip, exit_step)
        networks = make_judges(teacher, critic, batch, score, grid)
        statistics, weight_B = state.rewards, jnp.ones(clip.shape[0])
        if rewards:
            values = jnp.stack(
                [reward.measure(arrays, clip, batch)
                 for reward, arrays in zip(rewards, frozen["rewards"], strict=True)]
            )  # fmt: skip
            statistics = update_statistics(statistics, values, dyna.reward_decay)
            weight_B = reward_weights(statistics, values, dyna)
        mouth = batch["mouth"][:, None, :, :, None]
        place = 1.0 + (config.mouth_weight - 1.0) * mouth
        place = place / jnp.mean(place, axis=(1, 2, 3, 4), keepdims=True)
        weight = place * weight_B.reshape(-1, 1, 1, 1, 1)

        def objective(clip: Array) -> tuple[Array, Metrics]:
            total, metrics = dmd.dmd_loss(clip, noise, t_BF, loss, grid, weight=weight, **networks)
            pull = jnp.mean(place * jnp.square(clip - batch["latent"]) * hybrid.reshape(-1, 1, 1, 1, 1))
            return total + 0.5 * config.regression * pull, {**metrics, "regression": pull}

        (value, metrics), slope = jax.value_and_grad(objective, has_aux=True)(clip)
        return slope, statistics, {**metrics, "student_loss": value, "reward": jnp.mean(weight_B)}

    def teach_student(
        state: DistillState, frozen: dict[str, Any], batch: Batch, streamed: Any, key: Array, rate: Array
    ) -> tuple[DistillState, Array]:
        """-> (what it changed, whether gradient and rewards were finite: else it changed only the report)."""
        done, inputs, hybrid = streamed
        exit_step = done.exits[0]
        # Made anew, so that the rollout can fill its own rings in place; and one, for all blocks exit alike.
        dit = roles.student(state.params, frozen["params"])
        cache = begin_cache(dit, sampling, batch["reference"], batch["text"], rings=1)
        slope, statistics, metrics = student_slope(
            state, frozen, batch, judged_clip(done), hybrid, key, exit_step
        )
        blocks, _, frames = done.x0.shape[:3]
        judged = jnp.arange(blocks) >= config.run_in
        learning = judged & learns(frames * jnp.arange(blocks), frames * blocks, rollout)
        gradient = replay_gradient(
            predict(frozen["params"]),
            state.params,
            done,
            inputs,
            cache,
            jnp.concatenate([jnp.zeros_like(done.x0[: config.run_in]), blocks_of(slope, frames)]),
            learning,
            rollout,
        )
        norm = optax.tree.norm(gradient)
        # Rewards are looked at themselves: neither their limits nor `dmd_loss` need let a NaN through.
        good = jnp.isfinite(norm) & jnp.all(jnp.isfinite(statistics.square))
        params, optimizer = update(optimizers[0], gradient, norm, good, state.optimizer, state.params, rate)
        latest = jnp.arange(steps) == exit_step
        by_exit = {
            f"dmd_exit_{step}": jnp.where(
                latest[step], metrics["dmd_gradient_norm"], state.report[f"dmd_exit_{step}"]
            )
            for step in range(steps)
        }
        average = follow(state.average, params, state.updates, train.ema_decay)
        learned = dataclasses.replace(
            state,
            params=params,
            average=keep_good(good, average, state.average),
            optimizer=optimizer,
            rewards=keep_good(good, statistics, state.rewards),
            updates=state.updates + good,
            report={**metrics, **by_exit, "student_grad_norm": norm},
        )
        return learned, good

    def update(
        optimizer: optax.GradientTransformation,
        gradient: Params,
        norm: Array,
        good: Array,
        opt_state: Any,
        params: Params,
        rate: Array,
    ) -> tuple[Params, Any]:
        """One optimizer step; none where it would not be good."""
        gradient = jax.tree.map(lambda g: jnp.where(good, g, 0.0), clip_by_norm(gradient, norm, clip))
        updates, new = optimizer.update(gradient, opt_state, params)
        params = jax.tree.map(lambda p, u: jnp.where(good, p + rate * u, p), params, updates)
        return params, keep_good(good, new, opt_state)

    def step_fn(
        state: DistillState, frozen: dict[str, Any], batch: Batch, rate: Array
    ) -> tuple[DistillState, Metrics]:
        batch = {name: jnp.asarray(value, jnp.float32) for name, value in batch.items() if name != "record"}
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        for_stream, for_critic, for_student = jax.random.split(key, 3)
        streamed = stream(state, frozen["params"], batch, for_stream)
        clip = judged_clip(streamed[0])

        noise, t_BF = draw_noise(for_critic, clip, streamed[0].exits[0])
        value, gradient = jax.value_and_grad(critic_loss)(
            state.critic, frozen["params"], batch, clip, noise, t_BF
        )
        norm = optax.tree.norm(gradient)
        good, usual = judge(state.usual, value, norm, train.spike)
        critic, critic_optimizer = update(
            optimizers[1], gradient, norm, good, state.critic_optimizer, state.critic, critic_scale * rate
        )
        state = dataclasses.replace(state, critic=critic, critic_optimizer=critic_optimizer, usual=usual)

        turn = state.step % config.update_ratio == config.update_ratio - 1
        turn &= good & (state.step >= config.critic_warmup)
        state, student_good = jax.lax.cond(
            turn,
            lambda state: teach_student(state, frozen, batch, streamed, for_student, rate),
            lambda state: (state, jnp.array(True)),
            state,
        )
        state = dataclasses.replace(state, step=state.step + 1)
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "bad": 1.0 - (good & student_good),
            "student_turn": turn.astype(jnp.float32),
            "spread": jnp.std(clip),
            "updates": state.updates.astype(jnp.float32),
            **state.report,
        }
        return state, metrics

    return jax.jit(step_fn, donate_argnums=0)
