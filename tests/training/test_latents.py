from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.config import VAEConfig
from lavatar_jax.data.faces import attention_map
from lavatar_jax.data.shards import read_dataset
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
        folder=str(tmp_path / "latents"), speech=str(tmp_path / "speech"), clips=5, blocks=1, motion_frames=5,
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
    with pytest.raises(UserError, match="choose another folder"):
        prepare_latents(LatentsConfig(**{**vars(parts), "clips": 6, "blocks": 2}))
