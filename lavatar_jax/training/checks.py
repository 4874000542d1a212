"""What no run can have, or would do nothing: told in one line, before anything is computed or written."""

from __future__ import annotations

from typing import Any

from lavatar_jax.config import DiTConfig
from lavatar_jax.data.loader import ShardSource
from lavatar_jax.errors import UserError
from lavatar_jax.training.run import Run
from lavatar_jax.training.self_forcing import SelfForcingConfig

SHARES = ("ema_decay", "warmup")
COUNTS = ("seconds", "steps", "batch", "accumulate", "log_every", "learning_rate")
NEVER_NEGATIVE = ("workers", "spike", "checkpoint_seconds", "weight_decay")


def check_run(run: Run) -> None:
    """Options of every stage, and how those of stage 2 fit together. Raises UserError."""
    train = run.train
    for name in COUNTS:
        if (value := getattr(train, name)) is not None and value <= 0:
            raise UserError(f"--train.{_option(name)} must be more than 0, not {value}")
    for name in NEVER_NEGATIVE:
        if getattr(train, name) < 0:
            raise UserError(f"--train.{_option(name)} must not be negative, as {getattr(train, name)} is")
    for name in SHARES:
        if not 0 <= getattr(train, name) < 1:
            raise UserError(f"--train.{_option(name)} must be from 0 to below 1, not {getattr(train, name)}")
    for group in ("optim", "critic_optim"):
        if hasattr(run, group) and getattr(run, group).clip < 0:
            raise UserError(f"--{_option(group)}.clip must be more than 0, or 0 to clip nothing")
    if run.checkpoint.keep < 1:
        raise UserError(
            f"--checkpoint.keep {run.checkpoint.keep}: a run keeps its newest checkpoint at least"
        )
    if run.checkpoint.every is not None and run.checkpoint.every < 1:
        raise UserError(f"--checkpoint.every {run.checkpoint.every}: give a number of steps, at least 1")
    if hasattr(run, "rollout"):
        _check_rollout(run)


def _check_rollout(run: Any) -> None:
    """Of stage 2 and its ODE beginning."""
    for name in ("schedule", "steps", "cache", "context"):  # `sampler_rollout` takes them from the sampler
        if getattr(run.rollout, name) != getattr(SelfForcingConfig(), name):
            raise UserError(
                f"--rollout.{name} follows from how the student will be sampled: set --sampling.steps, "
                "--sampling.shift, --sampling.history or --sampling.history-sigma"
            )
    parts = 1 if run.whole_batch else run.train.accumulate
    if run.train.batch < 2 * parts and run.score.without_audio == "other" and run.loss.guidance:
        raise UserError(
            "--score.without-audio other leads away from the voice of another clip of the batch: "
            f"--train.batch {run.train.batch} has none" + (f" in each of {parts} parts" if parts > 1 else "")
        )
    if run.train.batch < 2 and run.distill.run_in:
        raise UserError(
            f"--distill.run-in {run.distill.run_in} takes blocks of another clip of the batch: "
            f"--train.batch {run.train.batch} has none"
        )
    if bool(run.dyna.alpha) != bool(run.dyna.rewards):
        raise UserError(
            "--dyna.alpha and --dyna.rewards go together: alpha is how much the rewards count "
            f"(now {run.dyna.alpha:g}), and there are {len(run.dyna.rewards)} of them"
        )
    if run.critic_optim.schedule != run.optim.schedule:
        raise UserError(
            f"--critic-optim.schedule {run.critic_optim.schedule}: the critic's rate follows the student's "
            f"schedule, --optim.schedule {run.optim.schedule}: give the same to both"
        )
    if not run.rollout.same_exit and (run.loss.below_exit or run.loss.above_next):
        raise UserError(
            "--rollout.no-same-exit: blocks that leave at different steps have no common noise level, which "
            "--loss.below-exit and --loss.above-next need"
        )


def check_records(source: ShardSource, model: DiTConfig) -> None:
    """Raises UserError where a transformer cannot take the records of a folder."""
    for bucket in source.buckets:
        shapes = bucket.shapes
        (frames, height, width, channels), audio = shapes["latent"], shapes["audio"]
        for what, found, wanted in (
            ("latent channels", channels, model.latent_channels),
            ("layers of audio features", audio[0], model.audio_layers),
            ("audio features", audio[1], model.audio_dim),
        ):
            if found != wanted:
                raise UserError(
                    f"the records in {source.folder} have {found} {what}, the model takes {wanted}: they "
                    "were prepared for another model (--data.folder)"
                )
        if frames % model.block_frames:
            raise UserError(
                f"the records in {source.folder} have {frames} latent frames, which are no whole blocks of "
                f"{model.block_frames} (--data.blocks when preparing, --model.block-frames)"
            )
        if height % model.patch or width % model.patch:
            raise UserError(
                f"the records in {source.folder} have {height} x {width} latents, the model's patches are "
                f"{model.patch} x {model.patch} (--model.patch)"
            )
    if source.text_shape != (model.text_len, model.text_dim):
        raise UserError(
            f"--data.text-len and --data.text-dim are {source.text_shape[0]} and {source.text_shape[1]}, the "
            f"model takes {model.text_len} and {model.text_dim}: give the same to both"
        )


def _option(name: str) -> str:
    return name.replace("_", "-")
