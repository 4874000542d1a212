"""Rendered clips become records once, with one set of options; folders of other records stay as they are."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.config import VAEConfig
from lavatar_jax.data.faces import attention_map
from lavatar_jax.data.shards import ShardWriter, read_dataset, read_manifest, stored_records
from lavatar_jax.data.speech import write_wav
from lavatar_jax.data.talking_clips import sample_clip
from lavatar_jax.errors import UserError
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.training import latents
from lavatar_jax.training.latents import LatentsConfig, open_latents, prepare_latents

VAE = VAEConfig(
    kind="wan22", width=4, multipliers=(1, 1, 1), res_blocks=1, temporal_downsample=(True, True), patch=2,
    latent_channels=3, latent_mean=(0.0,) * 3, latent_std=(1.0,) * 3,
)  # fmt: skip


@pytest.fixture(scope="module")
def vae() -> CausalVAE:
    """An untrained VAE that stands in for a trained one."""
    return jax.jit(lambda: make_vae(VAE, rngs=nnx.Rngs(0)))()


@pytest.fixture
def config(tmp_path: Path, vae: CausalVAE, monkeypatch: pytest.MonkeyPatch) -> LatentsConfig:
    """Noise for speech."""
    noise = np.random.default_rng(0).normal(scale=0.1, size=3 * 16_000).astype(np.float32)
    (tmp_path / "speech" / "train").mkdir(parents=True)
    write_wav(tmp_path / "speech" / "train" / "00000.wav", noise)
    monkeypatch.setattr(latents, "load_vae", lambda run: (VAE, vae))
    return LatentsConfig(
        folder=str(tmp_path / "latents"), vae=str(tmp_path / "vae"), speech=str(tmp_path / "speech"),
        clips=5, blocks=1, motion_frames=5,
        size=32, other_pose=0.5, text_len=6, text_dim=4,
    )  # fmt: skip


def test_a_record_has_the_truth_of_its_clip_in_step(config: LatentsConfig):
    prepare_latents(config)
    source = open_latents(config)
    assert len(source) == 5
    record = source.record(3)
    clip = sample_clip(3, 17, 32, "train", speech=Path(config.speech))
    assert record["caption"] == clip.caption
    np.testing.assert_array_equal(record["openness"], np.float16(clip.motion.mouth_open[5:]))
    np.testing.assert_array_equal(record["audio"], np.float16(clip.audio[:, :, 4:]))
    assert record["latent"].shape == (3, 4, 4, 3)
    assert record["motion"].shape == (2, 4, 4, 3)
    assert record["mouth"].max() == 255
    eyes = attention_map(clip.identity, clip.motion, 4, mouth_weight=1.0, eye_weight=2.0)[..., 0].mean(axis=0)
    row, column = np.unravel_index(np.argmax(eyes), (4, 4))
    assert record["mouth"][row, column] > 40  # the loss looks at blinks too


def test_references_show_the_person_in_other_poses(config: LatentsConfig):
    def difference(other_pose: float, other_scene: float, index: int) -> float:
        clip = sample_clip(index, 5, 32, "train", speech=Path(config.speech))
        changed = LatentsConfig(other_pose=other_pose, other_scene=other_scene)
        picture = latents.draw_reference_picture(clip, changed)
        np.testing.assert_array_equal(picture, latents.draw_reference_picture(clip, changed))
        return float(np.abs(picture - clip.reference).mean())

    assert difference(0.0, 1.0, 0) == 0.0
    assert 0.001 < difference(1.0, 0.0, 0) < difference(1.0, 1.0, 0)


def test_an_interrupted_encoding_goes_on_and_a_finished_one_is_extended(
    config: LatentsConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(latents, "SHARD_CLIPS", 2)
    whole = prepare_latents(config)
    expected = [open_latents(config).record(i) for i in range(5)]
    statistics = read_dataset(whole)

    made = []
    sample = latents.sample_clip

    def interrupted(index: int, *args, **kwargs):
        made.append(index)
        if index == 3 and made.count(3) == 1:
            raise KeyboardInterrupt
        return sample(index, *args, **kwargs)

    monkeypatch.setattr(latents, "sample_clip", interrupted)
    parts = LatentsConfig(**{**vars(config), "folder": config.folder + "2", "clips": 4})
    with pytest.raises(KeyboardInterrupt):
        prepare_latents(parts)
    with pytest.raises(UserError, match="not finished"):
        open_latents(parts)
    prepare_latents(parts)
    assert made == [0, 1, 2, 3, 3]
    more = LatentsConfig(**{**vars(parts), "clips": 5})
    prepare_latents(more)
    assert made == [0, 1, 2, 3, 3, 4]
    prepare_latents(more)
    assert len(made) == 6
    found = [open_latents(more).record(i) for i in range(5)]
    for one, other in zip(expected, found, strict=True):
        assert {name: np.asarray(x).tobytes() for name, x in one.items()} == {
            name: np.asarray(x).tobytes() for name, x in other.items()
        }
    np.testing.assert_allclose(read_dataset(parts.folder).std, statistics.std)
    Path(parts.folder, latents.RENDERED).unlink()  # as folders of earlier versions
    with pytest.raises(UserError, match=r"has clips of shape .*choose another folder"):
        prepare_latents(LatentsConfig(**{**vars(parts), "clips": 6, "blocks": 2}))
    with pytest.raises(UserError, match=r"--data\.blocks must be at least 1, not 0"):
        prepare_latents(LatentsConfig(**{**vars(parts), "blocks": 0}))


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def full(config: LatentsConfig) -> LatentsConfig:
    """Three clips, encoded at step 10 of the VAE's run."""
    (Path(config.vae) / "checkpoints" / "10").mkdir(parents=True)
    config = dataclasses.replace(config, clips=3)
    prepare_latents(config)
    return config


OTHER: list[tuple[dict[str, Any], str]] = [
    ({"other_pose": 0.75}, r"made with --data\.other-pose 0\.5, not 0\.75: choose another --data\.folder"),
    ({"other_scene": 1.0}, r"--data\.other-scene 0\.0, not 1\.0"),
    ({"vae": "runs/another"}, r"--data\.vae .*, not runs/another"),
    ({"speech": "runs/voices"}, r"--data\.speech .*, not runs/voices"),
    ({"blocks": 2}, r"--data\.blocks 1, not 2"),
    ({"motion_frames": 9}, r"--data\.motion-frames 5, not 9"),
    ({"clips": 4, "size": 64}, r"--data\.size 32, not 64"),
]


def test_a_folder_holds_clips_of_one_kind(full: LatentsConfig):
    before = contents(full.folder)
    for change, message in OTHER:
        with pytest.raises(UserError, match=message):
            prepare_latents(dataclasses.replace(full, **change))
    assert contents(full.folder) == before


def test_clips_of_a_vae_that_was_trained_further_are_refused(full: LatentsConfig, vae: CausalVAE):
    fewer = dataclasses.replace(full, clips=2)
    prepare_latents(fewer)  # another stage may want fewer
    (Path(full.vae) / "checkpoints" / "20").mkdir()
    for config in (full, fewer, dataclasses.replace(full, clips=4)):
        with pytest.raises(UserError, match=r"made with step 10 of .*vae, which is at step 20 now: choose"):
            prepare_latents(config)
    Path(full.folder, latents.RENDERED).unlink()  # as folders of earlier versions
    prepare_latents(dataclasses.replace(full, clips=4, other_pose=0.75))
    assert read_dataset(full.folder).records == 4
    assert not Path(full.folder, latents.RENDERED).exists(), "what is unknown stays so"


def test_clips_of_another_training_in_the_same_place_are_refused(config: LatentsConfig, vae: CausalVAE):
    step = Path(config.vae) / "checkpoints" / "10"
    step.mkdir(parents=True)
    metadata = step / "_CHECKPOINT_METADATA"
    metadata.write_text('{"init_timestamp_nsecs": 1}')
    prepare_latents(config)
    metadata.write_text('{"init_timestamp_nsecs": 2}')
    with pytest.raises(UserError, match=r"made with another training of .*vae than"):
        prepare_latents(config)


def test_a_shard_that_was_removed_is_made_again(config: LatentsConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latents, "SHARD_CLIPS", 2)
    folder = prepare_latents(config)
    before = {row["id"]: record for row, record in zip(
        read_manifest(folder), stored_records(folder, read_manifest(folder)), strict=True)}  # fmt: skip
    (folder / "shard-00001.array_record").unlink()
    (folder / "dataset.json").unlink()
    prepare_latents(config)
    rows = read_manifest(folder)
    assert sorted(row["id"] for row in rows) == sorted(before)
    for row, record in zip(rows, stored_records(folder, rows), strict=True):
        np.testing.assert_array_equal(record["latent"], before[row["id"]]["latent"])


@pytest.mark.parametrize("finished", [True, False])
def test_other_records_are_read_and_never_added_to(full: LatentsConfig, finished: bool):
    source, config = open_latents(full), dataclasses.replace(full, folder=full.folder + "-real", clips=9)
    with ShardWriter(config.folder) as writer:
        Path(config.folder, latents.PREPARED).write_text("{}")
        writer.write({**source.record(0), "id": "someone"}, fps=25)
        if finished:
            writer.finish(mean=source.mean, std=source.std, encoder={"source": "videos"})
    for settings in (True, False):
        if not settings:
            Path(config.folder, latents.PREPARED).unlink()
        before = contents(config.folder)
        if finished:
            prepare_latents(config)
        else:
            with pytest.raises(UserError, match="its preparation was not finished"):
                prepare_latents(dataclasses.replace(config, clips=9 * settings))
        assert contents(config.folder) == before


def test_without_a_vae_the_error_is_about_the_folder(config: LatentsConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"latents: no such folder of training records"):
        prepare_latents(dataclasses.replace(config, clips=0))
    with pytest.raises(UserError, match=r"latents has no 5 clips, and none can .*train stage 0 first"):
        prepare_latents(config)
    assert not Path(config.folder).exists()
