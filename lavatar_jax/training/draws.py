"""What a step of distillation leaves to chance, drawn for the whole batch before any of it is computed.

So a batch that is computed in parts is the same batch, however many they are. What a sample takes from
another one, its voice or the end of its clip, is looked up here too: in a part the other one may be missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lavatar_jax.errors import UserError
from lavatar_jax.training import dmd
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.dynaforcing import DynaConfig, draw_starts
from lavatar_jax.training.scores import Batch, ScoreConfig, unconditional
from lavatar_jax.training.self_forcing import SelfForcingConfig, denoised_range, draw_exits


class Noised(NamedTuple):
    """With what noise, and at which timesteps, a judge sees a clip."""

    noise: Float[Array, "B F H W C"]
    t: Float[Array, "B F"]


class Course(NamedTuple):
    """What all samples of a step share."""

    exits: Int[Array, " K"]
    sinks: Array  # key of the sink's distances (`student.block_inputs`)


class Draws(NamedTuple):
    """What each sample has for itself, the samples in front.

    `streamed`: "latent", "audio" and "pose" of the batch, with the end of another clip in front (the run-in).
    `away`: "audio" and "text" that guidance leads away from.
    `starts`: the step at which each of its K blocks begins, where some start from noised truth (`hybrid`).
    """

    streamed: Batch
    away: Batch
    noise: Float[Array, "B F H W C"]  # of the streamed clip
    renoise: Float[Array, "B K S f H W C"] | None
    starts: Int[Array, "B K"] | None
    hybrid: Bool[Array, " B"]
    critic: Noised
    student: Noised


def with_run_in(batch: Batch, frames: int) -> Batch:
    """The arrays of a clip that run along its time, each behind the last latent `frames` of another clip.

    Raises UserError where the clips are shorter.
    """
    along = {"latent": (1, frames), "audio": (-1, 4 * frames), "pose": (1, frames)}

    def longer(x: Array, axis: int, count: int) -> Array:
        length = x.shape[axis]
        if count > length:
            raise UserError(
                f"--distill.run-in: {frames} latent frames in front of a clip are the end of another one, "
                "and clips are shorter: give fewer blocks"
            )
        end = jax.lax.slice_in_dim(x, length - count, length, axis=axis)
        return jnp.concatenate([jnp.roll(end, 1, axis=0), x], axis=axis)

    return {name: longer(batch[name], *where) for name, where in along.items() if name in batch}


def make_draw(
    *, run_in: int, rollout: SelfForcingConfig, score: ScoreConfig, loss: DMDConfig, dyna: DynaConfig
) -> Callable[[Array, Batch, int], tuple[Course, Draws]]:
    """`draw(key, batch, block_frames)`: everything that one step on a batch draws.

    `run_in`: blocks in front of the clips; drawing raises UserError where these are shorter.
    """
    steps = len(rollout.timesteps)
    ranges = jnp.array([denoised_range(step, rollout) for step in range(steps)], jnp.int32)

    def draw_noised(key: Array, clip: tuple[int, ...], exit_step: Array) -> Noised:
        """For clips of shape `clip` [B, F, H, W, C] that were left at `exit_step`."""
        level, noise = jax.random.split(key)
        exit_from, exit_to = ranges[exit_step]
        t = dmd.draw_timestep(level, clip[0], loss, exit_from=exit_from, exit_to=exit_to)
        t_BF = jnp.broadcast_to(dmd.shift_timestep(t, loss)[:, None], clip[:2])
        return Noised(jax.random.normal(noise, clip), t_BF)

    def draw(key: Array, batch: Batch, block_frames: int) -> tuple[Course, Draws]:
        for_stream, for_critic, for_student = jax.random.split(key, 3)
        for_sinks, for_noise, for_exits, for_renoise, for_starts = jax.random.split(for_stream, 5)
        streamed, bare = with_run_in(batch, run_in * block_frames), unconditional(batch, score)
        samples, frames, *size = streamed["latent"].shape
        blocks = frames // block_frames
        exits = draw_exits(for_exits, blocks, rollout)
        renoise = None
        if rollout.transition == "renoise" or rollout.cache == "context":
            renoise = jax.random.normal(for_renoise, (samples, blocks, steps, block_frames, *size))
        starts, hybrid = None, jnp.zeros(samples, bool)
        if dyna.hybrid:
            first, hybrid = draw_starts(for_starts, samples, jnp.min(exits), steps, dyna)
            # The truth in front of the clip shows somebody else.
            starts = jnp.where(jnp.arange(blocks) < run_in, 0, first[:, None])
        clip = batch["latent"].shape
        draws = Draws(
            streamed=streamed,
            away={name: bare[name] for name in ("audio", "text")},
            noise=jax.random.normal(for_noise, streamed["latent"].shape),
            renoise=renoise,
            starts=starts,
            hybrid=hybrid,
            critic=draw_noised(for_critic, clip, exits[0]),
            student=draw_noised(for_student, clip, exits[0]),
        )
        return Course(exits, for_sinks), draws

    return draw
