"""Stage 2: Self-Forcing DMD makes a student of few steps of a model of stage 1 (method sections 4 and 6)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lavatar_jax.config import DiTConfig, SamplingConfig
from lavatar_jax.diffusion import TIMESTEPS
from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.flops import StreamShape, clip_flops, step_flops
from lavatar_jax.inference.denoise import schedule
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.parallel import STACKED, train_mesh
from lavatar_jax.training.checks import check_records
from lavatar_jax.training.distill_state import DistillState, create_distill_state
from lavatar_jax.training.distill_step import DistillConfig, Roles, StepFn, make_distill_step
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.dynaforcing import DynaConfig, Reward, load_rewards
from lavatar_jax.training.latents import LatentsConfig, open_training
from lavatar_jax.training.optim import OptimConfig, make_optimizer
from lavatar_jax.training.precision import compute_in
from lavatar_jax.training.run import Run, fit_run, note_other_clips
from lavatar_jax.training.samples import make_sampler, make_stream_evaluator
from lavatar_jax.training.scores import ScoreConfig
from lavatar_jax.training.self_forcing import SelfForcingConfig
from lavatar_jax.training.state import Params, release, split_model
from lavatar_jax.training.weights import LoraConfig, abstract_weights, fresh_adapters, initial_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillRun(Run):
    """Everything that `train.py` can set for stage 2. `train.learning_rate` is the student's.

    `init`: what student, critic and teacher start from: a run of stage 1, or a model folder. `teacher`:
    another one for teacher and critic. `lora` of a rank: student and critic are adapters on `init`, which is
    the teacher itself, so that the weights exist once; `lora.init`: the student's adapters of stage 1.
    """

    # Whether a sample finds the others of its whole batch, or of its part under `train.accumulate`.
    whole_batch: ClassVar[bool] = True

    out: str = "runs/distill"
    init: str | None = "runs/dit"
    teacher: str | None = None  # must be told where `init` is itself a student, as of `ode_init`
    model: DiTConfig
    data: LatentsConfig
    sampling: SamplingConfig  # how the student will be sampled: steps, levels, ring, sink, history
    rollout: SelfForcingConfig  # its levels and its cache are those of `sampling`
    score: ScoreConfig
    loss: DMDConfig
    dyna: DynaConfig
    distill: DistillConfig
    critic_optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)  # its clip is `optim`'s
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    clip: tuple[int, int, int] = (12, 16, 16)  # latent frames, rows, columns that a plan is made for

    def make(self, rngs: nnx.Rngs) -> CausalDiT:
        return CausalDiT(self.model, rngs=rngs)


def sampler_rollout(rollout: SelfForcingConfig, sampling: SamplingConfig) -> SelfForcingConfig:
    """The rollout with the noise levels and the kind of history of a sampler.

    Raises UserError where the exits do not fit its number of steps.
    """
    weights = rollout.exit_weights
    if weights and (len(weights) != sampling.steps or min(weights) < 0 or sum(weights) <= 0):
        raise UserError(
            f"--rollout.exit-weights {weights} must be one for each of the sampler's {sampling.steps} steps"
        )
    context = {"noisy": 0.0, "clean": 0.0, "fixed_noise": TIMESTEPS * sampling.history_sigma}
    return dataclasses.replace(
        rollout,
        schedule=schedule(sampling),
        cache="noisy" if sampling.history == "noisy" else "context",
        context=context[sampling.history],
    )


def make_roles(config: DistillRun) -> Roles:
    """Three whole networks; or one frozen network, which is the teacher, and two sets of adapters on it."""
    precision = config.train.precision
    trained = compute_in(abstract_weights(config.make, config.lora, config.train.seed).merge, precision)
    _, plain = split_model(jax.eval_shape(lambda: config.make(nnx.Rngs(0))))
    teacher = compute_in(plain, precision)
    if not config.lora.rank:
        return Roles(student=lambda p, _: trained(p), critic=lambda p, _: trained(p), teacher=teacher)
    return Roles(
        student=trained,
        critic=trained,
        teacher=lambda frozen: teacher({name.removesuffix(".base"): x for name, x in frozen.items()}),
    )


def make_step(config: DistillRun, params: Params, rewards: list[Reward]) -> tuple[StepFn, tuple]:
    """-> (the step of a run, the optimizers of student and critic). `params` may be abstract."""
    student, critic = (
        make_optimizer(params, stacked=STACKED, weight_decay=config.train.weight_decay, config=optim)
        for optim in (config.optim, config.critic_optim)
    )
    step_fn = make_distill_step(
        make_roles(config),
        (student, critic),
        sampling=config.sampling,
        rollout=sampler_rollout(config.rollout, config.sampling),
        score=config.score,
        loss=config.loss,
        dyna=config.dyna,
        config=config.distill,
        train=config.train,
        clips=(config.optim.clip, config.critic_optim.clip),
        rewards=rewards,
    )
    return step_fn, (student, critic)


def check_teacher(config: DistillRun) -> None:
    """Raises UserError where a student, of the ODE stage or of stage 2, would be its own teacher."""
    path = Path(config.init or "") / "config.json"
    if config.init is None or config.teacher is not None or not path.is_file():
        return
    run = json.loads(path.read_text())
    if "distill" not in run:  # what runs of both stages have
        return
    hint = f"--teacher {run.get('teacher') or run.get('init')}"
    if config.lora.rank:
        hint = "train it with --lora.rank too, and start from its teacher with its adapters: --lora.init"
    raise UserError(f"--init {config.init} is a student, which cannot be the teacher: {hint}")


def starting_weights(config: DistillRun, mesh: Mesh) -> tuple[Params, Params, Params]:
    """-> (the student's parameters, the critic's, what is frozen). Raises UserError."""
    check_teacher(config)
    seed = config.train.seed
    student = initial_weights(config.make, mesh, init=config.init, seed=seed, adapters=config.lora)
    if not config.lora.rank:
        if config.teacher is None:
            return student.params, student.params, student.params
        teacher = initial_weights(config.make, mesh, init=config.teacher, seed=seed)
        return student.params, teacher.params, teacher.params
    if config.teacher is not None:
        raise UserError("with adapters the teacher is the model that they are on: leave --teacher out")
    critic = fresh_adapters(config.make, mesh, seed=seed + 1, adapters=config.lora)
    return student.params, critic, student.frozen


def sample_flops(config: DistillRun, size: tuple[int, int, int]) -> float:
    """FLOP that a step takes for each sample, on average over exits and turns; layers computed anew under
    `train.remat` do not count. `size`: latent frames, rows and columns of a clip."""
    model, sampling, lora = config.model, config.sampling, config.lora.rank > 0
    frames, height, width = size
    shape = StreamShape(
        config=model, height=height, width=width, ring_blocks=sampling.ring_blocks, motion=False
    )
    block, clip = (
        sum(shape.flops(text_cached=False).values()),
        clip_flops(model, *size, causal=config.score.kind == "causal"),
    )
    blocks, lead = frames // model.block_frames, config.distill.run_in
    weights = np.array(config.rollout.exit_weights or (1.0,) * sampling.steps)
    extra = int(sampling.history != "noisy")
    forwards = float(weights @ np.arange(1, len(weights) + 1) / weights.sum()) + extra
    guided = (config.loss.guidance, config.loss.text_guidance, config.loss.fake_guidance)
    judged = clip * (2 + sum(map(bool, guided)))
    replayed = blocks * step_flops(block, lora=lora) + (lead + extra * (blocks + lead)) * block
    streamed = (blocks + lead) * forwards * block
    return streamed + step_flops(clip, lora=lora) + (judged + replayed) / config.distill.update_ratio


def train_distill(config: DistillRun, *, stop_at: int | None = None) -> DistillState:
    """Encode clips if needed, then train (or go on with) the student of `config.out`, up to step `stop_at`.

    Raises UserError."""
    train = config.train
    mesh = train_mesh(config.mesh, samples=train.batch // train.accumulate)
    source, batches = open_training(
        config.data,
        train,
        Path(config.out),
        held_out=config.samples.records,
        negative=config.score.without_text == "negative",
    )
    check_records(source, config.model)
    params, critic, base = starting_weights(config, mesh)
    rewards = load_rewards(config.dyna, config)
    step_fn, optimizers = make_step(config, params, rewards)
    state = create_distill_state(
        params,
        critic,
        optimizers,
        steps=config.sampling.steps,
        rewards=len(rewards),
        seed=train.seed,
        mesh=mesh,
    )
    release((params, critic), keep=base)
    frozen = {"params": base, "rewards": [reward.arrays for reward in rewards]}
    size = source.buckets[0].latent_size
    note_other_clips(size[0], config.clip[0])
    flops = train.batch * sample_flops(config, size)
    student = make_roles(config).student

    def averaged(state: DistillState) -> CausalDiT:
        return student(state.average, base)

    names = [name.partition(":")[2] for name, _ in config.dyna.rewards]
    measured = dict(zip(names, rewards, strict=True))
    return fit_run(
        config,
        step_fn,
        state,
        frozen,
        batches,
        mesh,
        flops=flops,
        evaluate=make_stream_evaluator(source, config.sampling, averaged, measured),
        sample=make_sampler(source, config.sampling, config.data.vae, averaged, every=config.samples.every),
        stop_at=stop_at,
    )
