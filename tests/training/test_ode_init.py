"""The teacher's paths, and what a student learns from them."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.config import SamplingConfig
from lavatar_jax.diffusion import FlowSchedule
from lavatar_jax.evaluation.flops import clip_flops, count_flops
from lavatar_jax.training.distill import make_roles
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.ode_init import OdeRun, make_ode_loss, path_flops, walk
from lavatar_jax.training.scores import ScoreConfig, make_flow, unconditional
from lavatar_jax.training.state import split_model
from tests.tiny import normal, random_dit, tiny_config
from train import load_config

MODEL = random_dit(tiny_config())
SCORE = ScoreConfig(kind="causal", without_audio="other", without_text="zeros")
BATCH = {
    "latent": normal(1, 2, 6, 4, 4, 3),
    "reference": normal(2, 2, 1, 4, 4, 3),
    "audio": normal(3, 2, 1, 2, 5, 24),
    "text": normal(4, 2, 4, 6),
}


def test_the_teacher_walks_in_small_guided_steps_by_the_students_levels() -> None:
    noise, sigmas = normal(5, 2, 6, 4, 4, 3), FlowSchedule(steps=2, shift=3.0).sigmas
    states, end = jax.jit(
        lambda noise: walk(
            MODEL,
            BATCH,
            noise,
            jnp.asarray(sigmas),
            SCORE,
            loss=DMDConfig(guidance=0.5, text_guidance=0.25),
            substeps=3,
        )
    )(noise)
    cond = jax.jit(make_flow(MODEL, BATCH, SCORE))
    uncond = jax.jit(make_flow(MODEL, unconditional(BATCH, SCORE), SCORE))
    no_text = jax.jit(make_flow(MODEL, {**BATCH, "text": jnp.zeros_like(BATCH["text"])}, SCORE))
    x, here = noise, []
    for first, last in itertools.pairwise(sigmas):
        here.append(x)
        levels = np.linspace(first, last, 4)
        for level, following in itertools.pairwise(levels):
            t = jnp.full((2, 6), 1000.0 * level)
            v = 1.75 * cond(x, t) - 0.5 * uncond(x, t) - 0.25 * no_text(x, t)
            x = x + (following - level) * v
    np.testing.assert_allclose(states, jnp.stack(here), atol=1e-4)
    np.testing.assert_allclose(end, x, atol=1e-4)


def test_flops_of_a_step_count_as_many_passes_as_its_trace_has() -> None:
    """Forward passes: the backward one counts as two, as everywhere."""
    run = load_config(str(Path(__file__).parents[2] / "configs" / "tiny_ode.py"))
    assert isinstance(run, OdeRun)
    guided = DMDConfig(guidance=0.5, text_guidance=0.25)
    run = dataclasses.replace(run, model=tiny_config(), loss=guided, substeps=3)
    params, _ = split_model(MODEL)
    loss = make_ode_loss(run, make_roles(run))
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in BATCH.items()}
    traced = count_flops(loss, params, params, batch, jax.random.key(0))
    one = count_flops(
        make_flow(MODEL, BATCH, SCORE), batch["latent"], jax.ShapeDtypeStruct((2, 6), jnp.float32)
    )
    passes = path_flops(run, (6, 4, 4)) / clip_flops(run.model, 6, 4, 4) - 2
    assert traced / one == pytest.approx(passes, rel=1e-3) == 37


@pytest.mark.parametrize(("substeps", "nothing_to_learn"), [(1, True), (2, False)])
def test_a_student_that_is_its_teacher_is_wrong_only_where_the_path_bends(substeps, nothing_to_learn) -> None:
    run = load_config(str(Path(__file__).parents[2] / "configs" / "tiny_ode.py"))
    assert isinstance(run, OdeRun)
    run = dataclasses.replace(
        run,
        model=tiny_config(),
        sampling=SamplingConfig(steps=1),
        score=SCORE,
        loss=DMDConfig(guidance=0.0),
        substeps=substeps,
    )
    params, _ = split_model(MODEL)
    loss = jax.jit(make_ode_loss(run, make_roles(run)))
    value, _ = loss(params, params, BATCH, jax.random.key(0))
    assert (value < 1e-9) == nothing_to_learn
