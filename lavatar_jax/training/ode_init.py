"""An ODE-initialised student: before it streams by itself, it learns to jump along its teacher's paths.

What Self-Forcing's predecessors begin with (CausVid), and an option to compare with: the teacher walks from
noise to a clip in many small Euler steps; the student, at one of its own few noise levels, learns to tell the
end of the walk from where it stands. The result is a run like those of stage 1, for `--init` of stage 2, with
this stage's teacher as its `--teacher`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lavatar_jax.diffusion import TIMESTEPS, euler_step, v_to_x0
from lavatar_jax.evaluation.flops import clip_flops, step_flops
from lavatar_jax.inference.denoise import schedule
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.parallel import STACKED, train_mesh
from lavatar_jax.training.checks import check_records
from lavatar_jax.training.distill import DistillRun, make_roles, starting_weights
from lavatar_jax.training.distill_step import Roles
from lavatar_jax.training.dmd import DMDConfig, guide
from lavatar_jax.training.latents import open_training
from lavatar_jax.training.optim import make_optimizer
from lavatar_jax.training.run import fit_run, run_step
from lavatar_jax.training.samples import make_sampler, make_stream_evaluator
from lavatar_jax.training.scores import Batch, ScoreConfig, make_flow, unconditional, without_prompt
from lavatar_jax.training.state import LossFn, Params, TrainState, create_state, release


@dataclasses.dataclass(frozen=True, kw_only=True)
class OdeRun(DistillRun):
    """As for stage 2, without `rollout`, `dyna` and `distill`, and of `loss` only the teacher's guidance."""

    whole_batch: ClassVar[bool] = False

    out: str = "runs/ode"
    substeps: int = 4  # of the teacher for each step of the student


def walk(
    teacher: CausalDiT,
    batch: Batch,
    noise: Float[Array, "B F H W C"],
    sigmas: Float[Array, " S+1"],
    score: ScoreConfig,
    *,
    loss: DMDConfig,
    substeps: int,
) -> tuple[Float[Array, "S B F H W C"], Float[Array, "B F H W C"]]:
    """The teacher's path, guided as in `loss` -> (where it is at each of the student's levels, its end)."""
    cond = make_flow(teacher, batch, score)
    uncond = make_flow(teacher, unconditional(batch, score), score)
    no_text = make_flow(teacher, without_prompt(batch, score), score)

    def velocity(x: Array, sigma: Array) -> Array:
        t_BF = jnp.full(x.shape[:2], TIMESTEPS * sigma)
        return guide(
            cond(x, t_BF),
            (loss.guidance, lambda: uncond(x, t_BF)),
            (loss.text_guidance, lambda: no_text(x, t_BF)),
        )

    def step(x: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        first, last = ends

        def substep(index: Array, y: Array) -> Array:
            here, there = (first + (last - first) * (index + i) / substeps for i in range(2))
            return euler_step(y, velocity(y, here), here, there)

        return jax.lax.fori_loop(0, substeps, substep, x), x

    end, states = jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))
    return states, end


def make_ode_loss(config: OdeRun, roles: Roles) -> LossFn:
    """`loss(params, frozen, batch, key)` of `run_step`; the student sees one level for all blocks."""
    sigmas = jnp.asarray(schedule(config.sampling).sigmas)
    student_score = dataclasses.replace(config.score, kind="causal")

    def loss_fn(params: Params, frozen: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        batch = {name: jnp.asarray(value, jnp.float32) for name, value in batch.items() if name != "record"}
        for_noise, for_step = jax.random.split(key)
        noise = jax.random.normal(for_noise, batch["latent"].shape)
        states, end = jax.lax.stop_gradient(
            walk(
                roles.teacher(frozen),
                batch,
                noise,
                sigmas,
                config.score,
                loss=config.loss,
                substeps=config.substeps,
            )
        )
        step = jax.random.randint(for_step, (), 0, len(sigmas) - 1)
        x, sigma = states[step], sigmas[step]
        flow = make_flow(roles.student(params, frozen), batch, student_score, remat=config.train.remat)
        x0 = v_to_x0(x, flow(x, jnp.full(x.shape[:2], TIMESTEPS * sigma)), sigma)
        return jnp.mean(jnp.square(x0 - end)), {"end_spread": jnp.std(end)}

    return loss_fn


def path_flops(config: OdeRun, size: tuple[int, int, int]) -> float:
    """FLOP that a step takes for each sample: the teacher's whole path, and the student's jump.

    `size`: latent frames, rows and columns of a clip.
    """
    seen = clip_flops(config.model, *size, causal=config.score.kind == "causal")
    judged = 1 + bool(config.loss.guidance) + bool(config.loss.text_guidance)
    walked = config.sampling.steps * config.substeps * judged * seen
    return walked + step_flops(clip_flops(config.model, *size), lora=config.lora.rank > 0)


def train_ode(config: OdeRun) -> TrainState:
    """Encode clips if needed, then train (or go on with) the student of `config.out`. Raises UserError."""
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
    params, _, frozen = starting_weights(config, mesh)
    optimizer = make_optimizer(params, stacked=STACKED, weight_decay=train.weight_decay, config=config.optim)
    roles = make_roles(config)
    step_fn = run_step(config, make_ode_loss(config, roles), optimizer)
    state = create_state(params, optimizer, train.seed, mesh=mesh)
    release(params, keep=frozen)

    def averaged(state: TrainState) -> CausalDiT:
        return roles.student(state.average, frozen)

    return fit_run(
        config,
        step_fn,
        state,
        frozen,
        batches,
        mesh,
        flops=train.batch * path_flops(config, source.buckets[0].latent_size),
        evaluate=make_stream_evaluator(source, config.sampling, averaged),
        sample=make_sampler(source, config.sampling, config.data.vae, averaged, every=config.samples.every),
    )
