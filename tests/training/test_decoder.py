"""The decoder learns on what the transformer predicts, in step with the true frames."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from lavatar_jax.checkpoints.runs import read_average
from lavatar_jax.config import DiTConfig, SamplingConfig, VAEConfig
from lavatar_jax.data.clips import unpack
from lavatar_jax.data.loader import ShardSource
from lavatar_jax.data.record_folder import CorruptRecordError
from lavatar_jax.data.records import Record
from lavatar_jax.data.speech import write_wav
from lavatar_jax.data.talking_clips import sample_clip
from lavatar_jax.errors import UserError
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.training import decoder, latents
from lavatar_jax.training.decoder import (
    DecoderRun,
    PredictionsConfig,
    load_dit,
    predict_clips,
    predicted_clips,
    prepare_predictions,
    random_window,
    train_decoder,
    window_batches,
)
from lavatar_jax.training.latents import LatentsConfig, open_latents, prepare_latents
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.optim import OptimConfig
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.state import param_paths
from lavatar_jax.training.vae import VAELossConfig, reconstruction_loss
from tests.tiny import random_dit

VAE = VAEConfig(
    kind="wan22", width=4, multipliers=(1, 1, 1), res_blocks=1, temporal_downsample=(True, True), patch=2,
    latent_channels=3, latent_mean=(0.0,) * 3, latent_std=(1.0,) * 3,
)  # fmt: skip
DIT = DiTConfig(
    layers=2, width=16, heads=2, ffn_width=16, latent_channels=3, patch=2, text_dim=4, text_len=6, freq_dim=8,
    audio_dim=LogMelConfig().dim, audio_layers=1, audio_tokens=2, inject_layers=(0,), use_motion=False,
    use_pose=False,
)  # fmt: skip
SAMPLING = SamplingConfig(motion=False, steps=2, doubly_shifted=False)  # the last step begins at 0.75


@functools.cache
def fresh_vae() -> CausalVAE:
    return jax.jit(lambda: make_vae(VAE, rngs=nnx.Rngs(0)))()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DecoderRun:
    """Untrained networks, noise for speech, and pictures of 32 pixels."""
    noise = np.random.default_rng(0).normal(scale=0.1, size=3 * 16_000).astype(np.float32)
    (tmp_path / "speech" / "train").mkdir(parents=True)
    write_wav(tmp_path / "speech" / "train" / "00000.wav", noise)
    vae = fresh_vae()
    monkeypatch.setattr(latents, "load_vae", lambda run: (VAE, vae))
    monkeypatch.setattr(decoder, "load_dit", lambda run: random_dit(DIT))
    data = LatentsConfig(
        folder=str(tmp_path / "latents"), speech=str(tmp_path / "speech"), clips=5, blocks=1, motion_frames=9,
        size=32, text_len=6, text_dim=4,
    )  # fmt: skip
    prepare_latents(data)
    return DecoderRun(
        out=str(tmp_path / "decoder"),
        init=None,
        model=VAE,
        data=data,
        predictions=PredictionsConfig(folder=str(tmp_path / "predictions"), clips=3, cells=2),
        sampling=SAMPLING,
        loss=VAELossConfig(),
        optim=OptimConfig(kind="adamw"),
        train=LoopConfig(steps=2, batch=2, learning_rate=1e-2),
    )


def test_a_window_shows_the_frames_of_its_last_latents() -> None:
    """Latent l >= 1 is the frames 4 l - 3 .. 4 l; a cell is 8 x 8 pixels, or 2 x 2 weights."""
    past, count, cells = 3, 9, 4
    latent = np.zeros((2, count, cells, cells, 3), np.float32)
    latent[..., 0] = np.arange(count)[None, :, None, None]
    latent[..., 1] = np.arange(cells * cells).reshape(cells, cells)
    latent[1, ..., 2] = 1.0  # the true ones
    frames = np.zeros((4 * count - 3, cells, cells, 2), np.uint8)
    frames[..., 0] = (np.arange(4 * count - 3)[:, None, None] + 3) // 4
    frames[..., 1] = np.arange(cells * cells).reshape(cells, cells)
    clip = {
        "latent": latent,
        "video": frames.repeat(8, axis=1).repeat(8, axis=2),
        "weight": frames.repeat(2, axis=1).repeat(2, axis=2)[..., 1],
        "record": np.int32(0),
    }
    random, seen = np.random.default_rng(0), set()
    for _ in range(200):
        window = random_window(clip, random, past=past, cells=2, truth=0.25, begin=False)
        assert window["latent"].shape == (2 * past, 2, 2, 3)
        np.testing.assert_array_equal(window["video"][::4, ::8, ::8], window["latent"][past:, :, :, :2])
        np.testing.assert_array_equal(window["weight"][::4, ::2, ::2], window["latent"][past:, :, :, 1])
        seen.add((*window["latent"][0, 0, 0], 0))
    assert {place[0] for place in seen} == {0.0, 3.0}  # where windows begin
    assert {place[1] for place in seen} == {float(4 * y + x) for y in range(3) for x in range(3)}
    assert {place[2] for place in seen} == {0.0, 1.0}
    window = random_window(clip, random, past=past, cells=2, truth=0.25, begin=True)
    assert window["video"].shape == (8 * past - 3, 16, 16, 2)
    np.testing.assert_array_equal(window["video"][0, ::8, ::8], window["latent"][0, :, :, :2])
    np.testing.assert_array_equal(window["video"][1::4, ::8, ::8], window["latent"][1:, :, :, :2])


def test_predictions_lie_on_the_networks_line_through_the_noised_truth(run: DecoderRun) -> None:
    source, dit = open_latents(run.data), random_dit(DIT)
    batch = source.read_batch(np.arange(2))
    noise = np.random.default_rng(1).normal(size=batch["latent"].shape).astype(np.float32)
    guess = jax.jit(lambda noise, sigma: predict_clips(dit, batch, noise, sigma))
    near, far = (np.asarray(guess(jnp.asarray(noise), sigma)) for sigma in (1e-4, 0.75))
    np.testing.assert_allclose(near, batch["latent"], atol=1e-2)
    assert np.abs(far - batch["latent"]).mean() > 0.3  # this network has learned nothing


def test_an_interrupted_preparation_goes_on_with_frames_and_latents_in_step(
    run: DecoderRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "CHUNK", 2)
    prepare_predictions(run)
    folder = Path(run.predictions.folder)
    names = ("latent", "video", "weight")
    whole = {name: np.load(folder / f"{name}.npy") for name in names}
    source = open_latents(run.data)
    for index in range(3):
        record = source.record(index)
        true = np.concatenate([record["motion"], record["latent"]]).astype(np.float32)
        np.testing.assert_allclose(whole["latent"][index, 1], true, atol=2e-2)
        np.testing.assert_allclose(whole["latent"][index, 0, :3], true[:3], atol=2e-2)
        assert np.abs(whole["latent"][index, 0, 3:] - true[3:]).mean() > 0.1
        clip = sample_clip(index, 21, 32, "train", speech=Path(run.data.speech))
        np.testing.assert_allclose(whole["video"][index], (clip.video + 1) * 127.5, atol=0.51)

    made: list[int] = []
    sample = decoder.sample_clip

    def interrupted(index: int, *args: object, **kwargs: object) -> object:
        made.append(index)
        if made == [0, 1, 2]:
            raise KeyboardInterrupt
        return sample(index, *args, **kwargs)

    monkeypatch.setattr(decoder, "sample_clip", interrupted)
    again = dataclasses.replace(
        run, predictions=dataclasses.replace(run.predictions, folder=str(folder) + "2")
    )
    with pytest.raises(KeyboardInterrupt):
        prepare_predictions(again)
    prepare_predictions(again)
    prepare_predictions(again)
    assert made == [0, 1, 2, 2]
    for name in names:
        np.testing.assert_array_equal(np.load(Path(f"{folder}2") / f"{name}.npy"), whole[name])


def test_what_stands_in_for_a_damaged_record_has_its_own_frames(
    run: DecoderRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = open_latents(run.data), ShardSource.record

    def damaged(self: ShardSource, number: int) -> Record:
        if number == 1:
            raise CorruptRecordError("damaged")
        return read(self, number)

    monkeypatch.setattr(ShardSource, "record", damaged)
    prepare_predictions(run)
    folder = Path(run.predictions.folder)
    latent, video = (np.load(folder / f"{name}.npy")[1] for name in ("latent", "video"))
    stands_in = int(source.read_batch(np.array([1]))["record"][0])
    assert stands_in != 1
    np.testing.assert_allclose(latent[1, 3:], read(source, stands_in)["latent"], atol=2e-2)
    clip = sample_clip(stands_in, 21, 32, "train", speech=Path(run.data.speech))
    np.testing.assert_allclose(video, (clip.video + 1) * 127.5, atol=0.51)


def test_only_the_decoder_learns(run: DecoderRun) -> None:
    state = train_decoder(run)
    assert int(state.step) == 2
    first = param_paths(fresh_vae())
    moved = {name for name in first if not np.array_equal(state.params[name], first[name])}
    assert moved
    assert all(name.startswith(("decoder", "post_quant")) for name in moved)
    assert read_average(Path(run.out)).keys() == first.keys()
    shapes = {name: array.shape for name, array in next(window_batches(run.predictions, 3, batch=2)).items()}
    assert shapes == {
        "latent": (2, 6, 2, 2, 3),
        "video": (2, 12, 16, 16, 3),
        "weight": (2, 12, 4, 4),
        "record": (2,),
    }


def test_a_bad_step_names_its_clips(run: DecoderRun) -> None:
    prepare_predictions(run)
    latent = np.load(Path(run.predictions.folder) / "latent.npy", mmap_mode="r+")
    latent[:] = np.nan
    latent.flush()
    bad = dataclasses.replace(run, train=dataclasses.replace(run.train, on_bad_step="stop"))
    with pytest.raises(UserError, match=r"step 1 was skipped: loss nan.*, batch of records [012], [012]\."):
        train_decoder(bad)


def test_windows_are_named_by_their_clips(tmp_path: Path) -> None:
    numbers = np.arange(4)
    np.save(tmp_path / "latent.npy", np.zeros((4, 2, 6, 4, 4, 3), np.float16))
    np.save(tmp_path / "video.npy", np.broadcast_to(numbers[:, None, None, None, None], (4, 21, 32, 32, 3)))
    np.save(tmp_path / "weight.npy", np.zeros((4, 21, 8, 8), np.uint8))
    config = PredictionsConfig(folder=str(tmp_path), clips=4, cells=2)
    batch = next(window_batches(config, 3, batch=4))
    np.testing.assert_array_equal(batch["record"], batch["video"][:, 0, 0, 0, 0])
    assert predicted_clips(config, slice(3, 4))[0]["record"] == 3


@pytest.mark.parametrize("begin", [0.0, 1.0])
def test_the_loss_is_that_of_the_whole_clip_decoded(run: DecoderRun, begin: float) -> None:
    prepare_predictions(run)
    batch = next(window_batches(dataclasses.replace(run.predictions, begin=begin), 3, batch=2))
    assert batch["video"].shape[1] == (21 if begin else 12)
    vae = fresh_vae()
    loss, _ = decoder.make_loss(lambda params, frozen: vae, run.loss)({}, {}, batch, jax.random.key(0))
    video, weight = unpack(batch)
    whole = vae.decode(batch["latent"].astype(np.float32))[:, -video.shape[1] :]
    assert float(loss) == pytest.approx(
        float(reconstruction_loss(whole, video, weight, run.loss)[0]), rel=1e-5
    )


def test_processes_draw_parts_of_the_same_windows(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.save(tmp_path / "latent.npy", random.normal(size=(3, 2, 6, 4, 4, 3)).astype(np.float16))
    np.save(tmp_path / "video.npy", random.integers(0, 255, (3, 21, 32, 32, 3)).astype(np.uint8))
    np.save(tmp_path / "weight.npy", random.integers(0, 255, (3, 21, 8, 8)).astype(np.uint8))
    config = PredictionsConfig(folder=str(tmp_path), clips=3, cells=2)
    whole, *halves, later = (window_batches(config, 3, batch=2) for _ in range(4))
    for part, half in enumerate(halves):
        half.take_part(part, 2)
    batches = [next(whole) for _ in range(3)]
    for batch in batches:
        parts = [next(half) for half in halves]
        for name, value in batch.items():
            np.testing.assert_array_equal(value, np.concatenate([half[name] for half in parts]))
    later.set_state({"next_index": 4})  # of grain's iterator, in an earlier checkpoint, which counted windows
    np.testing.assert_array_equal(next(later)["latent"], batches[2]["latent"])


def test_held_out_clips_are_shown_and_not_trained_on(run: DecoderRun, tmp_path: Path) -> None:
    blind = dataclasses.replace(run, samples=SamplesConfig(records=1, every=0.0))
    with pytest.raises(UserError, match=r"--samples\.every 0 shows none .* and this stage measures nothing"):
        train_decoder(blind)
    run = dataclasses.replace(run, samples=SamplesConfig(records=1))
    train_decoder(run)
    pictures = list(Path(run.out).rglob("*.webp"))
    assert {picture.name for picture in pictures} == {"clip0.webp"}
    with Image.open(pictures[0]) as picture:
        assert picture.size == (2 * 2 * 32, 2 * 32)  # truth beside drawing, each pixel 2 x 2
        assert picture.n_frames == run.data.video_frames

    folder = Path(run.predictions.folder)
    video = np.load(folder / "video.npy", mmap_mode="r+")
    video[2] = 255  # the last clip
    video.flush()
    batches = window_batches(run.predictions, 3, held_out=1, batch=2)
    assert not any((next(batches)["video"] == 255).all(axis=(1, 2, 3, 4)).any() for _ in range(20))
    with pytest.raises(UserError, match=r"--samples\.records 3 leaves no clip"):
        prepare_predictions(dataclasses.replace(run, samples=SamplesConfig(records=3)))


def test_what_cannot_be_predicted_is_refused(run: DecoderRun, tmp_path: Path) -> None:
    many = dataclasses.replace(run, predictions=dataclasses.replace(run.predictions, clips=6))
    with pytest.raises(UserError, match="5 records"):
        prepare_predictions(many)
    with pytest.raises(UserError, match=r"not a run of stage 1 or 2.*config\.json is missing"):
        load_dit(tmp_path)
    for cells in (0, 5):
        wrong = dataclasses.replace(run, predictions=dataclasses.replace(run.predictions, cells=cells))
        with pytest.raises(UserError, match=rf"cells {cells} is not within the latents' 4 x 4"):
            prepare_predictions(wrong)
    data = dataclasses.replace(run.data, folder=str(tmp_path / "long past"), motion_frames=13, clips=3)
    prepare_latents(data)
    with pytest.raises(UserError, match=r"a window takes 4 latents .* have 3: prepare longer ones"):
        prepare_predictions(dataclasses.replace(run, data=data))
    prepare_predictions(run)
    with pytest.raises(UserError, match=r"has predictions of .*distill, not of another"):
        prepare_predictions(dataclasses.replace(run, dit="another"))
    more_steps = dataclasses.replace(run, sampling=dataclasses.replace(run.sampling, steps=4))
    with pytest.raises(UserError, match=r"at noise level 0\.75, not 0\.5.* \(--sampling\)"):
        prepare_predictions(more_steps)
    other_noise = dataclasses.replace(run, predictions=dataclasses.replace(run.predictions, seed=1))
    with pytest.raises(UserError, match=r"of --predictions\.seed 0, not 1: choose"):
        prepare_predictions(other_noise)
    with pytest.raises(UserError, match=r"made with --data\.speech .*, not voices"):
        prepare_predictions(dataclasses.replace(run, data=dataclasses.replace(run.data, speech="voices")))
    manifest = Path(run.data.folder) / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps({**row, "id": f"clip{i}"}) + "\n" for i, row in enumerate(rows)))
    with pytest.raises(UserError, match="not rendered"):
        prepare_predictions(run)


def test_a_network_that_cannot_be_read_leaves_no_note(
    run: DecoderRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(run: str) -> None:
        raise UserError(f"{run} is missing")

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "load_dit", missing)
        with pytest.raises(UserError, match="another is missing"):
            prepare_predictions(dataclasses.replace(run, dit="another"))
    prepare_predictions(run)


def test_predictions_of_an_earlier_network_are_refused(run: DecoderRun, tmp_path: Path) -> None:
    run = dataclasses.replace(run, dit=str(tmp_path / "dit"))
    (tmp_path / "dit" / "checkpoints" / "5").mkdir(parents=True)
    prepare_predictions(run)
    prepare_predictions(run)
    metadata = tmp_path / "dit" / "checkpoints" / "5" / "_CHECKPOINT_METADATA"
    for time in (1, 2):
        metadata.write_text(json.dumps({"init_timestamp_nsecs": time}))
        note = Path(run.predictions.folder) / "predicted_by.json"
        if time == 1:
            note.write_text(json.dumps(json.loads(note.read_text()) | {"time": 1}))
            prepare_predictions(run)
    with pytest.raises(UserError, match=r"predictions of another training of .*dit than the one"):
        prepare_predictions(run)
    (tmp_path / "dit" / "checkpoints" / "6").mkdir()
    with pytest.raises(UserError, match=r"predictions of step 5 of .*dit, not of its step 6: choose"):
        prepare_predictions(run)
    note = Path(run.predictions.folder) / "predicted_by.json"
    note.write_text(json.dumps({"dit": run.dit, "latents": run.data.folder}))  # as earlier versions wrote it
    prepare_predictions(run)
