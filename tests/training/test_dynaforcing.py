"""Hybrid starts, reward weights with running statistics, and the mouth rewards of rendered faces."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.data.loader import ShardSource
from lavatar_jax.data.record_folder import CorruptRecordError
from lavatar_jax.data.records import Record
from lavatar_jax.data.shards import ShardWriter
from lavatar_jax.errors import UserError
from lavatar_jax.training.dynaforcing import (
    DynaConfig,
    RewardStatistics,
    check_starts,
    draw_starts,
    load_rewards,
    reward_weights,
    update_statistics,
)
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.rewards import correlation, fit_probe, mouth_sync, opening

CONFIG = DynaConfig(hybrid=0.3, alpha=0.5, rewards=(("a:b", 1.0), ("c:d", 0.5)))


def test_a_share_of_samples_starts_from_noised_truth_and_never_after_the_exit() -> None:
    starts, hybrid = (np.asarray(x) for x in draw_starts(jax.random.key(0), 4000, jnp.int32(2), 4, CONFIG))
    assert abs(hybrid.mean() - 0.3) < 0.03
    assert (starts[~hybrid] == 0).all()
    shares = np.bincount(starts[hybrid], minlength=4) / hybrid.sum()
    # Half as often with every step after that of pure noise: 4, 2, 1 of 7; the last becomes the exit.
    np.testing.assert_allclose(shares, [0, 4 / 7, 3 / 7, 0], atol=0.05)


def test_a_rollout_that_ends_at_the_first_step_starts_from_noise_alone() -> None:
    starts, hybrid = draw_starts(jax.random.key(0), 100, jnp.int32(0), 4, CONFIG)
    assert not np.asarray(hybrid).any()
    assert not np.asarray(starts).any()


@pytest.mark.parametrize(
    ("steps", "weights"), [(1, ()), (4, (1.0, 1.0)), (4, (0.0, 0.0, 0.0)), (4, (1.0, -1.0, 1.0))]
)
def test_starts_that_there_are_not_are_refused(steps: int, weights: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"--dyna\."):
        check_starts(dataclasses.replace(CONFIG, start_weights=weights), steps)
    check_starts(CONFIG, 2)


def test_samples_count_by_their_normalised_rewards() -> None:
    statistics, random = RewardStatistics.empty(2), np.random.default_rng(0)
    for _ in range(300):
        values = jnp.asarray(random.normal(size=(2, 16)) * [[2.0], [0.1]] + [[5.0], [-1.0]], jnp.float32)
        statistics = update_statistics(statistics, values, 0.98)
    # One deviation above the mean in both, in none, below in both.
    values = jnp.array([[7.0, 5.0, 3.0], [-0.9, -1.0, -1.1]])
    weights = np.log(reward_weights(statistics, values, CONFIG)) / CONFIG.alpha
    np.testing.assert_allclose(weights, [1.5, 0.0, -1.5], atol=0.25)
    far = reward_weights(statistics, 100.0 * values, CONFIG)
    assert np.log(far).max() <= CONFIG.alpha * CONFIG.reward_limit + 1e-5


def test_the_first_batch_is_its_own_statistics() -> None:
    values = jnp.array([[1.0, 3.0]])
    config = dataclasses.replace(CONFIG, rewards=(("a:b", 1.0),))
    statistics = update_statistics(RewardStatistics.empty(1), values, 0.98)
    np.testing.assert_allclose(np.log(reward_weights(statistics, values, config)), [-0.5, 0.5], atol=1e-2)


def test_a_reward_that_does_not_exist_is_a_clear_error() -> None:
    for name in ("no.such.module:reward", "lavatar_jax.training.rewards:no_reward", "nothing"):
        with pytest.raises(UserError, match="no reward"):
            load_rewards(DynaConfig(rewards=((name, 1.0),)), None)


def test_the_probe_reads_the_mouth_and_the_reward_tells_who_follows_the_speech() -> None:
    random = np.random.default_rng(0)
    openness = random.uniform(size=(120, 48)).astype(np.float32)
    latent = random.normal(size=(120, 1, 6, 6, 8)) + 0.03 * random.normal(size=(120, 12, 6, 6, 8))
    latent[:, :, 3:5, 3:5, :4] += openness.reshape(120, 12, 1, 1, 4)
    mouth = np.zeros((120, 6, 6), np.float32)
    mouth[:, 3:5, 3:5] = 1.0
    probe = fit_probe(latent[:90], mouth[:90], openness[:90])
    assert list(zip(probe.row, probe.column, strict=True)) == [(3, 3), (3, 4), (4, 3), (4, 4)]
    read = opening(probe, latent[90:])
    assert correlation(read, openness[90:]).min() > 0.85
    assert np.abs(correlation(read, np.roll(openness[90:], 1, axis=0)).mean()) < 0.4
    assert correlation(jnp.zeros((1, 48)), openness[:1]) == 0


def test_a_damaged_record_does_not_end_a_run_with_rewards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path) as writer:
        for index in range(60):
            openness = random.uniform(size=16).astype(np.float16)
            latent = 0.03 * random.normal(size=(4, 2, 2, 4))
            latent += openness.reshape(4, 1, 1, 4)
            writer.write(
                {
                    "id": f"clip{index}",
                    "caption": "",
                    "latent": latent.astype(np.float16),
                    "reference": np.zeros((1, 2, 2, 4), np.float16),
                    "audio": np.zeros((1, 1, 16), np.float16),
                    "openness": openness,
                }
            )
        writer.finish(mean=np.zeros(4), std=np.ones(4), encoder={})
    read = ShardSource.record

    def damaged(self: ShardSource, number: int) -> Record:
        if number == 7:
            raise CorruptRecordError("damaged")
        return read(self, number)

    monkeypatch.setattr(ShardSource, "record", damaged)
    run = SimpleNamespace(data=LatentsConfig(folder=str(tmp_path)))
    source = ShardSource(tmp_path, text_len=1, text_dim=1)
    batch = source.read_batch(np.arange(5))
    reward = mouth_sync(run)
    assert reward.measure(reward.arrays, batch["latent"], batch).mean() > 0.7
