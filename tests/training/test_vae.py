import dataclasses
import functools
import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from lavatar_jax.config import VAEConfig
from lavatar_jax.data import clips
from lavatar_jax.data.clips import ClipsConfig, ClipSource, clip_batches, random_crop, render_clips
from lavatar_jax.data.faces import random_training_frames
from lavatar_jax.errors import UserError
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.parallel import MeshConfig, put_batch, train_mesh
from lavatar_jax.training import run as run_module
from lavatar_jax.training import vae
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.optim import make_optimizer
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.stages import train
from lavatar_jax.training.state import create_state, make_train_step, split_model
from lavatar_jax.training.vae import (
    VAELossConfig,
    VAERun,
    edges,
    gentle_start,
    make_loss,
    make_sampler,
    reconstruction_loss,
    shared_batches,
    train_vae,
)
from lavatar_jax.training.weights import abstract_weights

MODEL = VAEConfig(
    kind="wan22", width=8, multipliers=(1, 2), temporal_downsample=(True,), res_blocks=1, patch=4,
    latent_channels=8, latent_mean=(0.0,) * 8, latent_std=(1.0,) * 8,
)  # fmt: skip


@functools.cache
def fresh_vae() -> CausalVAE:
    return jax.jit(lambda: make_vae(MODEL, rngs=nnx.Rngs(0)))()


@pytest.fixture
def data(tmp_path: Path) -> ClipsConfig:
    """Clips without a renderer: a bright square that moves over a gradient."""
    folder = tmp_path / "clips"
    folder.mkdir()
    video = np.zeros((6, 5, 32, 32, 3), np.uint8)
    video[:] = np.linspace(20, 160, 32, dtype=np.uint8)[:, None, None]
    weight = np.full((6, 5, 8, 8), 16, np.uint8)
    for clip in range(6):
        for frame in range(5):
            top = 3 * clip + frame
            video[clip, frame, top : top + 8, 8:16] = (250, 200, 40)
            weight[clip, frame, top // 4 : top // 4 + 2, 2:4] = 64
    np.save(folder / "video.npy", video)
    np.save(folder / "weight.npy", weight)
    (folder / "done.txt").write_text("6")
    (folder / "rendered.json").write_text(json.dumps({"frames": 5, "size": 32, "seed": 0}))
    return ClipsConfig(folder=str(folder), clips=6, frames=5, size=32, crop_size=16, crop_frames=3)


def test_a_folder_holds_clips_of_one_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def paint(key: jax.Array, count: int, frames: int, size: int) -> tuple[jax.Array, jax.Array]:
        weight = jnp.ones((count, frames, size, size, 1))
        return jax.random.uniform(key, (count, frames, size, size, 3)), weight

    monkeypatch.setattr(clips, "random_training_frames", paint)
    config = ClipsConfig(folder=str(tmp_path / "clips"), clips=3, frames=5, size=8)
    video = render_clips(config) / "video.npy"
    first = video.read_bytes()
    for change, message in (
        ({"seed": 1}, r"made with --data\.seed 0, not 1: choose another --data\.folder"),
        ({"frames": 9}, r"--data\.frames 5, not 9"),
        ({"size": 16, "clips": 9}, r"--data\.size 8, not 16"),
    ):
        with pytest.raises(UserError, match=message):
            render_clips(dataclasses.replace(config, **change))
    render_clips(dataclasses.replace(config, crop_frames=1))
    assert video.read_bytes() == first
    assert not capsys.readouterr().err

    (tmp_path / "clips" / "rendered.json").unlink()  # as folders of earlier versions
    render_clips(dataclasses.replace(config, seed=1))
    assert video.read_bytes() != first
    assert "unknown seed" in capsys.readouterr().err
    render_clips(dataclasses.replace(config, seed=1))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_frames": 9}, r"--data\.crop-frames 9 is larger than the clips, which have 5"),
        ({"crop_size": 40}, r"--data\.crop-size 40 is larger than the clips, which have 32"),
        ({"clips": -1}, r"--data\.clips must be at least 0"),
        ({"clips": 0}, r"has no pictures of videos: prepare them .* or say by --data\.clips how many"),
        ({"frames": 6}, r"--data\.frames must be 1 \+ 2k, not 6"),
        ({"crop_size": 20}, r"--data\.crop-size must be a multiple of 8 pixels, not 20"),
    ],
)
def test_clips_that_cannot_be_cut_are_refused(data: ClipsConfig, change: dict[str, int], message: str):
    wrong = dataclasses.replace(data, **change)
    run = VAERun(out="unused", model=MODEL, data=wrong, loss=VAELossConfig(), train=LoopConfig())
    with pytest.raises(UserError, match=message):
        train(run)


@pytest.mark.parametrize("name", ["seconds", "steps", "batch", "accumulate", "log_every", "learning_rate"])
def test_a_run_of_nothing_is_refused(data: ClipsConfig, name: str):
    run = VAERun(out="unused", model=MODEL, data=data, loss=VAELossConfig(), train=LoopConfig(**{name: 0}))
    with pytest.raises(UserError, match=f"--train.{name.replace('_', '-')} must be more than 0"):
        train(run)


def test_batches_are_crops_and_whole_clips(data: ClipsConfig):
    batches = clip_batches(data, crops=4, whole=2)
    shapes = {next(batches)["video"].shape for _ in range(12)}
    assert shapes == {(4, 3, 16, 16, 3), (2, 5, 32, 32, 3)}


def test_a_bad_step_names_its_clips(data: ClipsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    video = np.load(Path(data.folder) / "video.npy")
    whole = next(clip_batches(dataclasses.replace(data, full_share=1.0), crops=4, whole=2))
    for clip, record in zip(whole["video"], whole["record"], strict=True):
        assert any(np.array_equal(clip[:, :, ::way], video[record]) for way in (1, -1))
    monkeypatch.setattr(vae, "gentle_start", lambda params, *_: jax.tree.map(lambda x: x + jnp.nan, params))
    run = VAERun(
        out=str(tmp_path / "vae"), model=MODEL, data=data, loss=VAELossConfig(),
        train=LoopConfig(steps=2, batch=4, on_bad_step="stop"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"step 1 was skipped: loss nan.*, batch of records \d(, \d)+\."):
        train_vae(run)


def test_two_processes_and_a_worker_share_the_batches_of_one(data: ClipsConfig):
    whole, *halves = (clip_batches(data, crops=4, whole=2, workers=workers) for workers in (0, 0, 1))
    for part, half in enumerate(halves):
        half.take_part(part, 2)
    try:
        for _ in range(6):
            parts = [next(half) for half in halves]
            for name, value in next(whole).items():
                np.testing.assert_array_equal(value, np.concatenate([half[name] for half in parts]))
    finally:
        halves[1].close()


def test_crops_of_a_number_stay_where_they_were():
    """Else a run that goes on with a new version would see other data."""
    t, y, x = np.meshgrid(np.arange(25), np.arange(64), np.arange(64), indexing="ij")
    weight = np.full((25, 16, 16), 16, np.uint8)
    weight[:, 5:8, 6:10] = 64
    clip = {"video": np.stack([t, y, x], axis=-1).astype(np.uint8), "weight": weight, "record": np.int32(0)}
    crops = [random_crop(clip, np.random.default_rng(seed), size=(16, 16), frames=5) for seed in range(6)]
    corners = [tuple(int(crop["video"][..., i].min()) for i in range(3)) for crop in crops]
    assert corners == [(17, 12, 16), (9, 24, 0), (17, 8, 36), (17, 4, 28), (15, 32, 40), (14, 40, 24)]


def test_an_earlier_checkpoint_goes_on_in_the_order_that_it_had(data: ClipsConfig):
    def kind(size: int, frames: int, batch: int, seed: int) -> grain.IterDataset:
        crop = functools.partial(random_crop, size=(size, size), frames=frames)
        shuffled = grain.MapDataset.source(ClipSource(data.folder)).seed(seed).shuffle().repeat(1000)
        return shuffled.random_map(crop).to_iter_dataset().batch(batch)

    earlier = iter(grain.IterDataset.mix([kind(16, 3, 4, 0), kind(32, 5, 2, 1)], weights=[0.8, 0.2]))
    for _ in range(7):
        next(earlier)
    batches = clip_batches(data, crops=4, whole=2)
    batches.set_state(json.loads(json.dumps(earlier.get_state())))
    for _ in range(6):
        expected, found = next(earlier), next(batches)
        for name, value in expected.items():
            np.testing.assert_array_equal(value, found[name])


def test_both_kinds_are_shared_by_devices_and_computed_in_parts(data: ClipsConfig):
    run = VAERun(
        model=MODEL, data=data, loss=VAELossConfig(), train=LoopConfig(steps=2, batch=8, accumulate=2)
    )
    for devices, whole in ((1, 2), (2, 4)):
        mesh = train_mesh(MeshConfig(data=devices))
        batches = shared_batches(run, mesh)
        found = [put_batch(next(batches), mesh)["video"] for _ in range(8)]
        assert {video.shape[:2] for video in found} == {(8, 3), (whole, 5)}


def test_squares_count_in_proportion():
    video, weight = jnp.zeros((1, 2, 8, 8, 3)), jnp.ones((1, 2, 8, 8, 1))
    plain, half = (
        float(reconstruction_loss(video + 0.5, video, weight, VAELossConfig(square=square))[0])
        for square in (0.0, 2.0)
    )
    assert half - plain == pytest.approx(2.0 * 0.5**2)


def test_the_loss_falls_on_a_fixed_batch(data: ClipsConfig):
    batch = next(clip_batches(data, crops=4, whole=2))
    params, merge = split_model(fresh_vae())
    params = gentle_start(params, 8, jax.random.key(0))
    optimizer = make_optimizer(params)
    step = make_train_step(make_loss(merge, VAELossConfig(latent_noise=0.05)), optimizer, 0.9)
    state, losses = create_state(params, optimizer, 0), []
    for _ in range(40):
        state, metrics = step(state, {}, batch, jnp.float32(0.01))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_decoder_fine_tuning_leaves_the_encoder_alone(data: ClipsConfig):
    batch = next(clip_batches(data, crops=4, whole=2))
    params, merge = split_model(fresh_vae())
    before = {name: np.asarray(value) for name, value in params.items()}
    optimizer = make_optimizer(params)
    loss = make_loss(merge, VAELossConfig(decoder_only=True, latent_noise=0.1))
    state, _ = make_train_step(loss, optimizer, 0.9)(
        create_state(params, optimizer, 0), {}, batch, jnp.float32(0.01)
    )
    changed = {name for name, value in state.params.items() if not np.array_equal(value, before[name])}
    assert all(name.startswith(("decoder", "post_quant")) for name in changed)
    assert "decoder.head.conv.weight" in changed


def test_a_wrong_mouth_costs_more_than_a_wrong_wall():
    video, weight = jnp.zeros((1, 2, 8, 8, 3)), jnp.ones((1, 2, 8, 8, 1)).at[:, :, :4].set(4.0)
    config = VAELossConfig(gradient=0.0, temporal=0.0, colour=0.0)
    at_mouth, _ = reconstruction_loss(video.at[:, :, :4].set(0.1), video, weight, config)
    at_wall, _ = reconstruction_loss(video.at[:, :, 4:].set(0.1), video, weight, config)
    assert float(at_mouth) == pytest.approx(4 * float(at_wall), rel=1e-5)


def test_blurred_texture_costs_and_texture_in_another_phase_does_not():
    stripes = jnp.where(jnp.arange(16) % 4 < 2, 0.5, -0.5)  # of two pixels
    video = jnp.broadcast_to(stripes[:, None, None], (1, 3, 16, 16, 3))
    weight = jnp.ones((1, 3, 16, 16, 1))

    def texture(output: jax.Array) -> float:
        return float(reconstruction_loss(output, video, weight, VAELossConfig(texture=1.0))[1]["texture"])

    assert texture(video) == 0.0
    assert texture(-video) == 0.0
    assert texture(jnp.zeros_like(video)) == pytest.approx(float(edges(video).mean()), rel=1e-5)
    assert texture(0.5 * video) == pytest.approx(0.5 * float(edges(video).mean()), rel=1e-5)
    plain, _ = reconstruction_loss(0.5 * video, video, weight, VAELossConfig())
    textured, metrics = reconstruction_loss(0.5 * video, video, weight, VAELossConfig(texture=2.0))
    assert float(textured - plain) == pytest.approx(2.0 * float(metrics["texture"]), rel=1e-4)


def test_the_report_shows_faces_beside_what_the_vae_keeps_of_them(data: ClipsConfig, tmp_path: Path):
    run = VAERun(
        out="unused",
        model=MODEL,
        data=data,
        loss=VAELossConfig(),
        samples=SamplesConfig(records=2),
        train=LoopConfig(steps=1),
    )
    nothing = VAERun(out="unused", model=MODEL, data=data, loss=VAELossConfig(), train=LoopConfig(steps=1))
    assert make_sampler(nothing, lambda state: state) is None
    sample = make_sampler(run, lambda state: state)
    assert sample is not None
    sample(fresh_vae(), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["face0.webp", "face1.webp"]
    key = jax.random.fold_in(jax.random.key(data.seed), data.clips)
    faces = random_training_frames(key, 2, data.frames, data.size)[0]
    for index in range(2):
        with Image.open(tmp_path / f"face{index}.webp") as picture:
            assert picture.size == (4 * 32, 2 * 32)
            shown = np.asarray(picture.convert("RGB"), np.float32)[::2, ::2] / 127.5 - 1.0
        truth = np.asarray(faces[index, 0])
        errors = [np.abs(half - truth).mean() for half in (shown[:, :32], shown[:, 32:])]
        assert errors[0] < 0.1 < errors[1]  # a VAE that never trained keeps nothing


def test_a_training_holds_its_state_once(data: ClipsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also one that goes on from a checkpoint."""
    train = LoopConfig(steps=4, batch=4)
    config = VAERun(out=str(tmp_path), model=MODEL, data=data, loss=VAELossConfig(), train=train)
    shape = max(abstract_weights(config.make).params.values(), key=lambda weight: weight.size).shape
    fit, counts = run_module.fit, []

    def count(arrays: Any) -> int:
        return sum(array.shape == shape for array in arrays)

    class Counting(SimpleNamespace):
        """Batches that count at each one how many such arrays are in memory."""

        def __next__(self) -> Any:
            counts.append(count(jax.live_arrays()) - before)
            return next(self.batches)

    def counted(step_fn: Any, state: Any, frozen: Any, batches: Any, *rest: Any, **options: Any) -> Any:
        counts.append(count(jax.tree.leaves(state)))
        feed = Counting(batches=batches, take_part=batches.take_part, get_state=batches.get_state)
        feed.set_state = batches.set_state
        return fit(step_fn, state, frozen, feed, *rest, **options)

    monkeypatch.setattr(run_module, "fit", counted)
    for stop_at in (1, 2):
        gc.collect()
        before = count(jax.live_arrays())
        train_vae(config, stop_at=stop_at)
    assert counts[0] >= 3  # parameters, their average, a moment
    assert len(set(counts)) == 1
    assert len(counts) == 4


def test_an_interrupted_run_goes_on_exactly(data: ClipsConfig, tmp_path: Path):
    def run(out: str, stop_at: int | None = None):
        train = LoopConfig(steps=4, batch=4, learning_rate=0.01)
        config = VAERun(out=str(tmp_path / out), model=MODEL, data=data, loss=VAELossConfig(), train=train)
        return train_vae(config, stop_at=stop_at)

    whole = run("whole")
    run("parts", stop_at=2)
    resumed = run("parts")
    assert int(resumed.step) == 4
    for name, value in whole.params.items():
        np.testing.assert_array_equal(value, resumed.params[name], err_msg=name)
