"""What the judges of distillation are asked, and under which conditions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.training.flow_grid import FlowGrid
from lavatar_jax.training.scores import ScoreConfig, make_denoiser, make_judges, unconditional
from tests.tiny import normal, random_dit, tiny_config

TEACHER, CRITIC = random_dit(tiny_config(), seed=0), random_dit(tiny_config(), seed=1)
GRID = FlowGrid()
BATCH = {
    "reference": normal(2, 2, 1, 4, 4, 3),
    "audio": normal(3, 2, 1, 2, 5, 24),
    "text": normal(4, 2, 4, 6),
    "negative_text": normal(5, 2, 4, 6),
}
NO_TEXT, NEGATIVE = jnp.zeros_like(BATCH["text"]), BATCH["negative_text"]


@pytest.mark.parametrize(
    ("without_text", "bare_text", "no_text"),
    [("keep", BATCH["text"], NO_TEXT), ("zeros", NO_TEXT, NO_TEXT), ("negative", NEGATIVE, NEGATIVE)],
)
def test_each_judge_sees_its_own_conditions(without_text: Any, bare_text: Any, no_text: Any) -> None:
    config = ScoreConfig(kind="causal", without_audio="other", without_text=without_text)
    noisy, t_BF = normal(1, 2, 6, 4, 4, 3), jnp.full((2, 6), 500.0)
    other_voice = BATCH["audio"][::-1]  # two clips, so each has the other's
    bare = {**BATCH, "audio": other_voice, "text": bare_text}
    expected = {
        "real": (TEACHER, BATCH),
        "real_uncond": (TEACHER, bare),
        "real_no_text": (TEACHER, {**BATCH, "text": no_text}),
        "fake": (CRITIC, BATCH),
        "fake_uncond": (CRITIC, bare),
    }

    @jax.jit
    def guesses(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        judges = make_judges(TEACHER, CRITIC, batch, unconditional(batch, config), config, GRID)
        return {name: judge(noisy, t_BF) for name, judge in judges.items()}

    found = guesses(BATCH)
    assert found.keys() == expected.keys()
    ask = jax.jit(lambda dit, batch: make_denoiser(dit, batch, config, GRID)(noisy, t_BF))
    for name, (dit, batch) in expected.items():
        np.testing.assert_allclose(found[name], ask(dit, batch), atol=1e-5, err_msg=name)
    different = [np.asarray(guess) for guess in found.values()]
    for index, guess in enumerate(different):
        assert all(np.abs(guess - other).max() > 1e-3 for other in different[:index])
