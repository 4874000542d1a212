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
from lavatar_jax.training.distill import make_roles
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.ode_init import OdeRun, make_ode_loss, walk
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
