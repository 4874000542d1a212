import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.checkpoints.runs import CheckpointConfig, read_average, result_step
from lavatar_jax.config import DiTConfig, SamplingConfig
from lavatar_jax.data.loader import record_batches
from lavatar_jax.data.motion import MANNERS
from lavatar_jax.data.shards import ShardWriter, stored_records
from lavatar_jax.errors import UserError
from lavatar_jax.inference.denoise import schedule
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.training import diffusion_forcing
from lavatar_jax.training.decoder import load_dit
from lavatar_jax.training.diffusion_forcing import (
    STACKED,
    DiTRun,
    ForcingConfig,
    draw_reference,
    draw_sigmas,
    make_loss,
    noise_motion,
    train_dit,
)
from lavatar_jax.training.latents import LatentsConfig, latent_statistics, open_latents
from lavatar_jax.training.logs import LOG, RunLog, read_log
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.optim import OptimConfig, make_optimizer
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.state import create_state, make_train_step, split_model
from tests.tiny import normal, random_dit, tiny_config
from train import load_config, main

MODEL = DiTConfig(
    layers=2, width=16, heads=2, ffn_width=16, latent_channels=4, patch=2, text_dim=4, text_len=3, freq_dim=8,
    audio_dim=6, audio_layers=1, audio_tokens=2, inject_layers=(0,), block_frames=1, use_motion=False,
    use_pose=False,
)  # fmt: skip
SIZE = (3, 4, 4)  # latent frames, rows, columns
CLIPS = 6
SAMPLING = SamplingConfig(steps=2, motion=False, adapt_sink_after=None, sink_distance=24, ring_blocks=2)


@pytest.fixture
def data(tmp_path: Path) -> LatentsConfig:
    """Encoded clips without an encoder: smooth random numbers of the right shapes."""
    folder = tmp_path / "latents"
    random = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for index in range(CLIPS):
            photo = 3.0 + 2.0 * random.normal(size=(1, *SIZE[1:], 4))
            writer.write(
                {
                    "id": str(index),
                    "caption": MANNERS[index % len(MANNERS)].caption,
                    "latent": np.repeat(photo, SIZE[0], axis=0).astype(np.float16),
                    "reference": photo.astype(np.float16),
                    "spread": np.full(4, 0.1, np.float16),
                    "audio": random.normal(size=(1, 6, 4 * SIZE[0])).astype(np.float16),
                    "mouth": np.full(SIZE[1:], 255, np.uint8),
                }
            )
        writer.flush()
        mean, std = latent_statistics(stored_records(folder, writer.rows))
        writer.finish(mean=mean, std=std, encoder={})
    return LatentsConfig(folder=str(folder), clips=CLIPS, text_len=3, text_dim=4)


def test_batches_are_normalised_and_of_the_shapes_that_the_loss_takes(data: LatentsConfig):
    source = open_latents(data)
    everything = np.stack([source[i]["latent"] for i in range(CLIPS)])
    assert np.abs(everything.mean(axis=(0, 1, 2, 3))).max() < 1e-2
    assert np.abs(everything.std(axis=(0, 1, 2, 3)) - 1).max() < 2e-2
    batch = next(record_batches(source, batch=2, seed=0))
    assert {name: value.shape for name, value in batch.items()} == {
        "latent": (2, 3, 4, 4, 4),
        "reference": (2, 1, 4, 4, 4),
        "audio": (2, 1, 1, 6, 12),
        "mouth": (2, 4, 4),
        "text": (2, 3, 4),
        "record": (2,),
    }


def test_a_channel_without_content_is_not_blown_up():
    record = {"latent": np.zeros((3, 4, 4, 1), np.float16), "spread": np.ones(1, np.float16)}
    assert latent_statistics([record, record])[1] == pytest.approx(1.0)


def test_noise_levels_are_of_the_three_kinds():
    config = ForcingConfig(same_level_clips=0.25, clean_clips=0.25, clean_blocks=1.0, clean_sigma=0.05)
    sigma = np.asarray(draw_sigmas(jax.random.key(0), 4000, 4, config))
    assert sigma.min() >= 0
    assert sigma.max() <= 1
    same = np.ptp(sigma, axis=1) == 0
    clean = (sigma <= 0.05).all(axis=1) & ~same
    assert abs(same.mean() - 0.25) < 0.03
    assert abs(clean.mean() - 0.25) < 0.03
    # Independent levels, shifted towards noise: the median of 3 u / (1 + 2 u) is 0.75.
    assert abs(np.median(sigma[~same & ~clean]) - 0.75) < 0.02


def test_a_share_of_clips_has_one_of_the_samplers_levels():
    config = ForcingConfig(
        sampled_clips=0.6, sampled_levels=(1.0, 0.75), same_level_clips=0.0, clean_clips=0.0
    )
    sigma = np.asarray(draw_sigmas(jax.random.key(0), 4000, 4, config))
    shares = [np.mean((sigma == level).all(axis=1)) for level in (1.0, 0.75)]
    np.testing.assert_allclose(shares, [0.3, 0.3], atol=0.03)
    assert np.mean(np.ptp(sigma, axis=1) > 0) == pytest.approx(1.0 - sum(shares))
    with pytest.raises(ValueError, match="sampled_levels"):
        ForcingConfig(sampled_clips=0.5)


def test_the_small_model_trains_at_the_levels_it_is_sampled_at():
    run = load_config("configs/tiny_dit.py")
    assert isinstance(run, DiTRun)
    np.testing.assert_array_equal(run.loss.sampled_levels, schedule(run.sampling).sigmas[:-1])


def test_the_reference_is_the_photo_or_a_frame_of_the_clip():
    photo = jnp.zeros((400, 1, 2, 2, 1))
    clip = jnp.broadcast_to(jnp.array([1.0, 2.0])[:, None, None, None], (400, 2, 2, 2, 1))
    config = ForcingConfig(other_reference=0.25, reference_noise=0.0)
    drawn = np.asarray(draw_reference(jax.random.key(0), photo, clip, config))[:, 0, 0, 0, 0]
    shares = [float(np.mean(drawn == value)) for value in (0, 1, 2)]
    np.testing.assert_allclose(shares, [0.75, 0.125, 0.125], atol=0.06)


def test_every_motion_frame_has_a_noise_level_of_its_own():
    kept = (
        np.asarray(noise_motion(jax.random.key(0), jnp.full((50, 19, 2, 2, 1), 1e4))).mean(axis=(2, 3, 4))
        / 1e4
    )
    assert kept.min() < 0.02
    assert kept.max() > 0.98
    assert abs(kept.mean() - 0.5) < 0.02
    assert np.median(np.std(kept, axis=1)) > 0.2


def test_what_reaches_the_loss():
    model = tiny_config(use_motion=True, use_pose=True)
    params, merge = split_model(random_dit(model))

    def batch(height: int, seed: int = 0) -> dict[str, jax.Array]:
        return {
            "latent": normal(1, 2, 6, height, 8, 3),
            "reference": normal(2, 2, 1, height, 8, 3),
            "audio": normal(3, 2, 1, 2, 5, 24),
            "text": normal(4, 2, 4, 6),
            "mouth": jnp.ones((2, height, 8)),
            "motion": normal(5 + seed, 2, 3, height, 8, 3),
            "pose": normal(6, 2, 6, height, 8, 3),
        }

    def losses(config: ForcingConfig):
        loss = jax.jit(make_loss(merge, model, config))
        return lambda batch: float(loss(params, {}, batch, jax.random.key(0))[0])

    keep, drop = (
        losses(ForcingConfig(motion_dropout=share, pose_dropout=share, sink_dropout=0.0))
        for share in (0.0, 1.0)
    )
    plain, tall = batch(8), batch(10)
    for name in ("motion", "pose"):
        changed = {**plain, name: plain[name] + 1.0}
        assert abs(keep(changed) - keep(plain)) > 1e-5, name
        assert drop(changed) == drop(plain), name
    assert np.isfinite(keep(tall))
    nearly_clean = losses(ForcingConfig(same_level_clips=0.0, clean_clips=1.0, clean_blocks=1.0))
    assert nearly_clean(plain) == 0.0  # context for others, and nothing to learn


def test_the_loss_falls_on_a_fixed_batch(data: LatentsConfig):
    batch = next(record_batches(open_latents(data), batch=4, seed=0))
    params, merge = split_model(jax.jit(lambda: CausalDiT(MODEL, rngs=nnx.Rngs(0)))())
    optimizer = make_optimizer(params, stacked=STACKED)
    step = make_train_step(make_loss(merge, MODEL, ForcingConfig()), optimizer, 0.9)
    state, losses = create_state(params, optimizer, 0), []
    for _ in range(60):
        state, metrics = step(state, {}, batch, jnp.float32(0.02))
        losses.append(float(metrics["loss"]))
    # The levels are drawn anew each step and the noise cannot be foreseen: it falls to 0.71, never to zero.
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def small_run(folder: Path, data: LatentsConfig) -> DiTRun:
    return DiTRun(
        out=str(folder / "whole"),
        model=MODEL,
        data=data,
        loss=ForcingConfig(),
        sampling=SAMPLING,
        samples=SamplesConfig(records=1),
        optim=OptimConfig(kind="adamw"),
        checkpoint=CheckpointConfig(keep=1, best="held_out_flow", best_mode="min"),
        train=LoopConfig(steps=4, batch=2, learning_rate=0.01, log_every=1),
    )


CONFIG_FILE = """
from pathlib import Path
from lavatar_jax.training.latents import LatentsConfig
from tests.training.test_diffusion_forcing import small_run

def get_config():
    return small_run(Path({folder!r}), {data!r})
"""


def test_the_command_trains_stops_at_a_signal_and_goes_on(
    data: LatentsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        diffusion_forcing, "make_sampler", lambda *arguments, **options: None
    )  # tested elsewhere
    config = tmp_path / "config.py"
    config.write_text(CONFIG_FILE.format(folder=str(tmp_path), data=data))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([str(config)])
    steps = RunLog.steps

    def interrupt(self: RunLog, step: int, *arguments: Any) -> None:
        steps(self, step, *arguments)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # when step 3 is on its way

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "steps", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main([str(config), "--out", str(parts)])
    assert result_step(parts) == 3
    main([str(config), "--out", str(parts)])
    steps = [json.loads(line).get("step") for line in (parts / LOG).read_text().splitlines()]
    assert [step for step in steps if step] == [1, 2, 3, 4], "nothing was done twice"
    found, expected = read_average(parts), read_average(whole)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)

    lines = list(read_log(whole / LOG))
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in lines if "step" in line)
    (evaluation,) = [line["evaluation"] for line in lines if "evaluation" in line]
    assert np.isfinite(evaluation["held_out_flow"])
    assert result_step(whole) == 4
    assert load_dit(whole).config == MODEL


def test_missing_latents_are_a_clear_error(tmp_path: Path):
    with pytest.raises(UserError, match="not a folder of training records"):
        open_latents(LatentsConfig(folder=str(tmp_path)))


def test_training_without_a_vae_is_a_clear_error(tmp_path: Path):
    run = DiTRun(
        out=str(tmp_path / "dit"),
        model=MODEL,
        data=LatentsConfig(folder=str(tmp_path / "latents"), vae=str(tmp_path / "vae")),
        loss=ForcingConfig(),
        train=LoopConfig(steps=1),
    )
    with pytest.raises(UserError, match="train stage 0 first"):
        train_dit(run)
