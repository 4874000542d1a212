"""One step of Self-Forcing DMD: stream a clip, teach the critic on it, and now and then the student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lavatar_jax.config import SamplingConfig
from lavatar_jax.errors import UserError
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.parallel import split_samples
from lavatar_jax.training import dmd
from lavatar_jax.training.bad_steps import judge
from lavatar_jax.training.distill_state import DistillState
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.draws import Course, Draws, Noised, make_draw
from lavatar_jax.training.dynaforcing import (
    DynaConfig,
    Reward,
    RewardStatistics,
    check_starts,
    reward_weights,
    update_statistics,
)
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.optim import clip_by_norm
from lavatar_jax.training.scores import Batch, ScoreConfig, make_denoiser, make_judges, pose_of
from lavatar_jax.training.self_forcing import (
    Rollout,
    SelfForcingConfig,
    gradient_of_rollout,
    learns,
    replay_gradient,
    roll_out,
)
from lavatar_jax.training.state import Metrics, Params, follow, in_parts
from lavatar_jax.training.student import (
    BlockInputs,
    StudentCache,
    begin_cache,
    block_inputs,
    blocks_of,
    clip_of,
    make_predict,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How student and critic learn. `learning_rate` of the loop is the student's."""

    critic_rate: float = 1e-3  # peak learning rate of the critic, on the loop's schedule
    update_ratio: int = 5  # critic steps for each step of the student
    critic_warmup: int = 0  # steps before the student first learns
    mouth_weight: float = 1.0  # of the student's gradient where the mouth is
    run_in: int = 0  # blocks streamed before the clip, to the end of another clip's voice, and not judged
    regression: float = 0.0  # pull of samples that started from noised truth towards the truth


StepFn = Callable[[DistillState, dict[str, Any], Batch, Array], tuple[DistillState, Metrics]]


class Roles(NamedTuple):
    """How the three networks are put together: two of (trained parameters, frozen), the teacher of frozen."""

    student: Callable[[Params, Params], CausalDiT]
    critic: Callable[[Params, Params], CausalDiT]
    teacher: Callable[[Params], CausalDiT]


class Streamed(NamedTuple):
    """What a rollout leaves (`Rollout`), the samples in front."""

    x0: Float[Array, "B K F H W C"]
    noisy: Float[Array, "B K F H W C"]
    context: Float[Array, "B K F H W C"] | None


def swap(tree: Any) -> Any:
    """Samples before blocks, or blocks before samples."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)


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
    clips: tuple[float, float],
) -> StepFn:
    """`step_fn(state, frozen, batch, rate) -> (state, metrics)`, jitted; donates the state.

    `frozen`: {"params": what the roles share, "rewards": arrays of each reward}. `clips`: of the gradient
    norms of student and critic. Metrics of the student are those of its latest update.

    Raises UserError for settings that do not go together.
    """
    if sampling.history == "noisy" and not rollout.same_exit and rollout.cache == "noisy":
        raise UserError("with a ring for each step all blocks must exit alike: --rollout.same-exit")
    check_starts(dyna, len(rollout.timesteps))
    if config.update_ratio < 1:
        raise UserError(f"--distill.update-ratio must be at least 1, not {config.update_ratio}")
    grid, critic_scale, parts = rollout.grid, config.critic_rate / train.learning_rate, train.accumulate
    steps = len(rollout.timesteps)
    draw = make_draw(run_in=config.run_in, rollout=rollout, score=score, loss=loss, dyna=dyna)

    def predict(frozen: Params) -> Any:
        return make_predict(lambda params: roles.student(params, frozen), remat=train.remat)

    def begin(
        dit: CausalDiT, batch: Batch, draws: Draws, course: Course, *, rings: int | None = None
    ) -> tuple[BlockInputs, StudentCache]:
        """What the rollout begins with, and its replay."""
        _, _, height, width, _ = draws.noise.shape
        inputs = block_inputs(
            dit.config,
            sampling,
            draws.streamed["audio"],
            (height, width),
            course.sinks,
            pose_of(dit, draws.streamed),
        )
        return inputs, begin_cache(dit, sampling, batch["reference"], batch["text"], rings=rings)

    def stream(params: Params, frozen: Params, batch: Batch, draws: Draws, course: Course) -> Streamed:
        dit = roles.student(params, frozen)
        inputs, cache = begin(dit, batch, draws, course)
        frames = dit.config.block_frames
        done = roll_out(
            predict(frozen),
            params,
            blocks_of(draws.noise, frames),
            None if draws.renoise is None else jnp.moveaxis(draws.renoise, 0, 2),
            course.exits,
            inputs,
            cache,
            rollout,
            truth=None if draws.starts is None else blocks_of(draws.streamed["latent"], frames),
            starts=None if draws.starts is None else draws.starts.T,
        )
        return Streamed(*swap((done.x0, done.noisy, done.context)))

    def judged_clip(streamed: Streamed) -> Array:
        return clip_of(swap(streamed.x0[:, config.run_in :]))

    def critic_loss(critic: Params, frozen: Params, batch: Batch, clip: Array, seen: Noised) -> Array:
        dit = roles.critic(critic, frozen)
        denoise = make_denoiser(dit, batch, score, grid, remat=train.remat)
        return dmd.critic_loss(clip, seen.noise, seen.t, grid, denoise)

    def student_slope(
        state: DistillState, frozen: Params, batch: Batch, draws: Draws, clip: Array, weight_B: Array
    ) -> tuple[Array, Metrics]:
        """Derivative of the student's loss by its clip."""
        teacher, critic = roles.teacher(frozen), roles.critic(state.critic, frozen)
        networks = make_judges(teacher, critic, batch, {**batch, **draws.away}, score, grid)
        mouth = batch["mouth"][:, None, :, :, None]
        place = 1.0 + (config.mouth_weight - 1.0) * mouth
        place = place / jnp.mean(place, axis=(1, 2, 3, 4), keepdims=True)
        weight = place * weight_B.reshape(-1, 1, 1, 1, 1)
        hybrid = draws.hybrid.reshape(-1, 1, 1, 1, 1)

        def objective(clip: Array) -> tuple[Array, Metrics]:
            noise, t_BF = draws.student
            total, metrics = dmd.dmd_loss(clip, noise, t_BF, loss, grid, weight=weight, **networks)
            pull = jnp.mean(place * jnp.square(clip - batch["latent"]) * hybrid)
            return total + 0.5 * config.regression * pull, {**metrics, "regression": pull}

        (value, metrics), slope = jax.value_and_grad(objective, has_aux=True)(clip)
        return slope, {**metrics, "student_loss": value}

    def student_gradient(
        state: DistillState, frozen: Params, course: Course, samples: tuple[Batch, Draws, Streamed, Array]
    ) -> tuple[Params, Metrics]:
        """By the student's parameters: the slope, replayed block by block."""
        batch, draws, streamed, weight_B = samples
        dit = roles.student(state.params, frozen)
        # Made anew, so that the rollout can fill its own rings in place; and one, for all blocks exit alike.
        inputs, cache = begin(dit, batch, draws, course, rings=1)
        slope, metrics = student_slope(state, frozen, batch, draws, judged_clip(streamed), weight_B)
        x0, noisy, context = swap(streamed)
        blocks, _, frames = x0.shape[:3]
        judged = jnp.arange(blocks) >= config.run_in
        learning = judged & learns(frames * jnp.arange(blocks), frames * blocks, rollout)
        differentiate = replay_gradient if rollout.replay else gradient_of_rollout
        gradient = differentiate(
            predict(frozen),
            state.params,
            Rollout(x0, noisy, course.exits, context, None),
            inputs,
            cache,
            jnp.concatenate([jnp.zeros_like(x0[: config.run_in]), blocks_of(slope, frames)]),
            learning,
            rollout,
        )
        return gradient, metrics

    def weigh(
        state: DistillState, arrays: Sequence[Any], batch: Batch, clip: Array
    ) -> tuple[RewardStatistics, Array]:
        """-> (the rewards' moments with this batch, the weight of each sample)."""
        if not rewards:
            return state.rewards, jnp.ones(clip.shape[0])

        def measure(samples: tuple[Array, Batch], _: Any) -> tuple[tuple[()], Array]:
            found = [reward.measure(own, *samples) for reward, own in zip(rewards, arrays, strict=True)]
            return (), jnp.stack(found, axis=1)

        _, values_BN = in_parts(measure, (clip, batch), parts)
        statistics = update_statistics(state.rewards, values_BN.T, dyna.reward_decay)
        return statistics, reward_weights(statistics, values_BN.T, dyna)

    def teach_student(
        state: DistillState, frozen: dict[str, Any], batch: Batch, draws: Draws, course: Course,
        streamed: Streamed, rate: Array,
    ) -> tuple[DistillState, Array]:  # fmt: skip
        """-> (what it changed, whether gradient and rewards were finite: else it changed only the report)."""
        statistics, weight_B = weigh(state, frozen["rewards"], batch, judged_clip(streamed))
        (gradient, metrics), _ = in_parts(
            lambda samples, _: (student_gradient(state, frozen["params"], course, samples), ()),
            (batch, draws, streamed, weight_B),
            parts,
        )
        norm = optax.tree.norm(gradient)
        # Rewards are looked at themselves: neither their limits nor `dmd_loss` need let a NaN through.
        good = jnp.isfinite(norm) & jnp.all(jnp.isfinite(statistics.square))
        params, optimizer = update(0, gradient, norm, good, state.optimizer, state.params, rate)
        latest = jnp.arange(steps) == course.exits[0]
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
            report={**metrics, **by_exit, "reward": jnp.mean(weight_B), "student_grad_norm": norm},
        )
        return learned, good

    def update(
        which: int,  # 0: the student, 1: the critic
        gradient: Params,
        norm: Array,
        good: Array,
        opt_state: Any,
        params: Params,
        rate: Array,
    ) -> tuple[Params, Any]:
        """One optimizer step; none where it would not be good."""
        clipped = clip_by_norm(gradient, norm, clips[which])
        gradient = jax.tree.map(lambda g: jnp.where(good, g, 0.0), clipped)
        updates, new = optimizers[which].update(gradient, opt_state, params)
        params = jax.tree.map(lambda p, u: jnp.where(good, p + rate * u, p), params, updates)
        return params, keep_good(good, new, opt_state)

    def step_fn(
        state: DistillState, frozen: dict[str, Any], batch: Batch, rate: Array
    ) -> tuple[DistillState, Metrics]:
        batch = {name: jnp.asarray(value, jnp.float32) for name, value in batch.items() if name != "record"}
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        block_frames = roles.student(state.params, frozen["params"]).config.block_frames
        course, draws = draw(key, batch, block_frames)
        draws = jax.tree.map(split_samples, draws)

        def stream_and_judge(samples: tuple[Batch, Draws], _: Any) -> tuple[tuple[Array, Params], Streamed]:
            """-> ((the critic's loss, its gradient), what was streamed)."""
            streamed = stream(state.params, frozen["params"], *samples, course)
            clip = judged_clip(streamed)
            critic = jax.value_and_grad(critic_loss)
            return critic(state.critic, frozen["params"], samples[0], clip, samples[1].critic), streamed

        (value, gradient), streamed = in_parts(stream_and_judge, (batch, draws), parts)
        norm = optax.tree.norm(gradient)
        good, usual = judge(state.usual, value, norm, train.spike)
        critic, critic_optimizer = update(
            1, gradient, norm, good, state.critic_optimizer, state.critic, critic_scale * rate
        )
        state = dataclasses.replace(state, critic=critic, critic_optimizer=critic_optimizer, usual=usual)

        turn = state.step % config.update_ratio == config.update_ratio - 1
        turn &= good & (state.step >= config.critic_warmup)
        state, student_good = jax.lax.cond(
            turn,
            lambda state: teach_student(state, frozen, batch, draws, course, streamed, rate),
            lambda state: (state, jnp.array(True)),
            state,
        )
        state = dataclasses.replace(state, step=state.step + 1)
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "bad": 1.0 - (good & student_good),
            "student_turn": turn.astype(jnp.float32),
            "spread": jnp.std(judged_clip(streamed)),
            "updates": state.updates.astype(jnp.float32),
            **state.report,
        }
        return state, metrics

    return jax.jit(step_fn, donate_argnums=0)
