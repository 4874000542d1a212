import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import SafetensorError

from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.store import SHIPPED, load_model_folder, model_folder, save_model_folder
from lavatar_jax.config import DiTConfig, SamplingConfig, VAEConfig
from lavatar_jax.errors import UserError
from lavatar_jax.models.avatar import Avatar, AvatarConfig
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.models.vae import make_vae

CONFIG = AvatarConfig(
    name="tiny",
    image_size=32,
    dit=DiTConfig(
        layers=2, width=16, heads=2, ffn_width=16, latent_channels=4, text_dim=4, text_len=2, freq_dim=8,
        audio_dim=4, audio_layers=1, inject_layers=(0,), use_motion=False, use_pose=False,
    ),
    vae=VAEConfig(
        kind="wan22", width=4, multipliers=(1, 2), temporal_downsample=(True,), res_blocks=1, patch=4,
        latent_channels=4, latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4,
    ),
    sampling=SamplingConfig(sink_distance=24, adapt_sink_after=None),
    log_mel=LogMelConfig(bands=20),
)  # fmt: skip


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    make = jax.jit(lambda: (CausalDiT(CONFIG.dit, rngs=nnx.Rngs(0)), make_vae(CONFIG.vae, rngs=nnx.Rngs(1))))
    dit, vae = make()
    return Avatar(config=CONFIG, dit=dit, vae=vae)


@pytest.fixture
def folder(avatar: Avatar, tmp_path: Path) -> Path:
    save_model_folder(tmp_path / "model", avatar)
    return tmp_path / "model"


def test_a_saved_folder_loads_as_the_same_model_in_half_precision(folder: Path, avatar: Avatar):
    loaded = load_model_folder(folder)
    assert loaded.config == CONFIG
    for saved, read in ((avatar.dit, loaded.dit), (avatar.vae, loaded.vae)):
        assert jax.tree.structure(saved) == jax.tree.structure(read)
        found = param_paths(read)
        for name, value in param_paths(saved).items():
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(np.asarray(value, np.float16), found[name], err_msg=name)


def test_saving_again_keeps_other_files_and_leaves_no_temporary_ones(folder: Path, avatar: Avatar):
    (folder / "README.md").write_text("card")
    renamed = avatar._replace(config=AvatarConfig(**{**vars(CONFIG), "name": "other"}))
    save_model_folder(folder, renamed)
    assert load_model_folder(folder).config.name == "other"
    assert (folder / "README.md").read_text() == "card"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["config.json", "dit.safetensors", "vae.safetensors"])
def test_a_truncated_or_missing_file_is_named(folder: Path, name: str):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        load_model_folder(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load_model_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"frobnicate": 1}, "frobnicate"), ({"dit": {"width": 17, "heads": 4}}, "heads"), ({"vae": {}}, "vae")],
)
def test_a_bad_config_is_one_clear_error(folder: Path, change: dict, message: str):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message):
        load_model_folder(folder)


def test_weights_of_another_size_are_refused(folder: Path):
    values = json.loads((folder / "config.json").read_text())
    values["dit"]["ffn_width"] = 24
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="does not fit"):
        load_model_folder(folder)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="nothing"):
        load_model_folder(tmp_path / "nothing")


@pytest.mark.parametrize("extra", ["checkpoints", "manifest"])
def test_a_folder_of_other_things_is_not_replaced(folder: Path, avatar: Avatar, extra: str):
    """A folder of runs, or a converted model: by a slip in a command line."""
    (folder / extra).mkdir()
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="holds other things than a small model; give another --out"):
        save_model_folder(folder, avatar)
    with pytest.raises(UserError, match="holds other things"):
        save_model_folder(folder.parent, avatar)
    assert sorted(folder.rglob("*")) == before


def test_a_full_disk_leaves_the_old_model(folder: Path, avatar: Avatar, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("lavatar_jax.checkpoints.store.save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_model_folder(folder, avatar)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_only_a_word_names_a_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(folder)
    assert model_folder("tiny") == SHIPPED / "tiny"
    for name in ("./tiny", "tiny/", str(tmp_path / "tiny")):
        assert model_folder(name).resolve() == folder
    assert model_folder(".").resolve() == tmp_path
    for name in ("x" * 300, "no/such"):
        with pytest.raises(UserError, match="no such model folder"):
            model_folder(name)
