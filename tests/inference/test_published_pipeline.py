"""From published files to a video: the folder is converted, and `serve.py generate` makes it talk.

Weights are random, so frames look like noise; that numbers are the reference's is shown in tests/parity. Here
everything must arrive: prompt, speech, adapters, dtype, size, and clear words where a folder is not whole.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from PIL import Image

import serve
from lavatar_jax.checkpoints.conversion import Task, convert_folder
from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.store import load_config, load_model_folder, load_text_encoder
from lavatar_jax.cli import run
from lavatar_jax.config import RELEASE_SINGLE, RELEASE_TPP
from lavatar_jax.inference.listen import listen
from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.inference.speech_features import speech_features
from lavatar_jax.inference.talk import photo_conditions, read_prompt
from lavatar_jax.inference.video import read_video
from lavatar_jax.models.avatar import Avatar
from lavatar_jax.quant import QuantizedWeight
from tests import published
from tools.pth import PickledTensors

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

SOUND = 0.3 * np.sin(np.arange(9_600) / 20).astype(np.float32)  # 0.6 s, 15 frames


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> published.Published:
    return published.write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def models(source: published.Published, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The converted folders, with the LoRA merged, by dtype."""
    root = tmp_path_factory.mktemp("converted")
    folders = {"bf16": root / "bf16", "fp8": root / "fp8"}
    for dtype, out in folders.items():
        convert_folder(Task(wan=source.wan, out=out, lora=source.lora, dtype=dtype), PickledTensors)
    return folders


@pytest.fixture(scope="module")
def avatar(models: dict[str, Path]) -> Avatar:
    return load_model_folder(models["bf16"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tall face.png and a voice.wav."""
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").resize((80, 160)).convert("RGB").save("face.png")
    soundfile.write("voice.wav", SOUND, SAMPLE_RATE)
    return tmp_path


GOOD = ["generate", "--image", "face.png", "--audio", "voice.wav", "--out", "out.mp4", "--scale", "1"]


@pytest.mark.parametrize(
    ("dtype", "size", "options"),
    [
        ("bf16", "128x64", []),
        ("fp8", "128x64", ["--streaming-audio"]),
        ("bf16", "64x64", ["--preset", "release-single"]),  # small: it encodes 365 copies of the photo
    ],
    ids=["bf16", "fp8 streaming", "bf16 release-single"],
)
def test_a_converted_folder_makes_a_video(
    folder: Path,
    models: dict[str, Path],
    dtype: str,
    size: str,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the proportions of the photo, which is tall, whatever way round the size is given."""
    sides = [int(side) for side in size.split("x")]
    arguments = [*GOOD, "--model", str(models[dtype]), "--size", size, "--steps", "4", *options]
    assert run(lambda: serve.main(arguments)) == 0
    video = read_video("out.mp4")
    assert video.frames.shape == (15, *sides, 3)
    assert video.frames.astype(np.float32).std(axis=0).mean() > 1, "nothing moves"
    assert video.sound is not None
    assert capsys.readouterr().err == ""


def test_dtypes_and_adapters_are_in_the_weights(source: published.Published, models: dict[str, Path]) -> None:
    weight = source.dit["blocks.1.ffn.0.weight"].astype(np.float32)
    prefix = "base_model.model.blocks.1.ffn.0.lora_"
    a, b = (source.adapters[f"{prefix}{name}.default.weight"] for name in "AB")
    want = (weight + 0.5 * b @ a).astype(jnp.bfloat16).T
    loaded = {dtype: load_model_folder(path) for dtype, path in models.items()}
    np.testing.assert_array_equal(loaded["bf16"].dit.blocks.ffn.inner.weight[...][1], want)
    eight = loaded["fp8"].dit.blocks.ffn.inner.weight.get_value()
    assert isinstance(eight, QuantizedWeight)
    np.testing.assert_allclose(eight.dequantize()[1], want.astype(np.float32), rtol=0.07, atol=1e-3)
    for model in loaded.values():
        floats = (leaf.dtype for part in (model.vae, model.speech) for leaf in jax.tree.leaves(part))
        assert set(floats) == {jnp.dtype(jnp.float32)}
        assert model.dit.dtype == jnp.bfloat16


def test_every_number_is_the_published_one(source: published.Published, models: dict[str, Path]) -> None:
    """For one tensor of each component that no adapter touches."""
    folder = models["bf16"]
    avatar = load_model_folder(folder)
    text = load_text_encoder(folder, avatar.config)
    assert avatar.speech is not None
    pairs = [
        (source.dit["head.head.weight"].T, avatar.dit.head.linear.weight),
        (source.vae["decoder.head.2.bias"], avatar.vae.decoder.head.conv.bias),
        (source.text["token_embedding.weight"], text.embedding),
        (source.speech["wav2vec2.feature_projection.projection.bias"], None),
    ]
    for want, parameter in pairs[:3]:
        np.testing.assert_array_equal(parameter[...], want)
    assert any(np.array_equal(leaf, pairs[3][0]) for leaf in param_paths(avatar.speech).values())


def test_prompts_reach_the_conditions(models: dict[str, Path], avatar: Avatar) -> None:
    folder, config = models["bf16"], avatar.config
    here, other = (read_prompt(folder, config, p) for p in ("a person talking", "a person smiling"))
    assert here.shape == (1, 512, config.dit.text_dim)
    tokens = int((np.abs(here[0]).max(axis=-1) > 0).sum())
    assert 3 < tokens < 20
    assert not np.any(here[0, tokens:])
    assert np.abs(here - other).max() > 0.1
    image = np.zeros((90, 170, 3), np.uint8)
    conditions = photo_conditions(avatar, image, here, image_size=(64, 128))
    np.testing.assert_array_equal(conditions.text, here)
    assert conditions.reference.shape == (1, 1, 8, 16, 16)
    with pytest.raises(ValueError, match="read_prompt"):
        photo_conditions(avatar, image, "a person talking")


def test_a_recording_is_heard_as_the_reference_hears_it(avatar: Avatar) -> None:
    """The first frame shown belongs to the first sample; only what the reference fills is zero."""
    assert avatar.speech is not None
    exact = speech_features(avatar.speech, SOUND, 48)
    blocks = list(listen(avatar, SOUND, RELEASE_TPP))
    assert [block.shape for block in blocks] == [(4, 32, 12)] * 2  # 15 frames, and three that are dropped
    heard = np.concatenate(blocks, axis=-1)
    np.testing.assert_array_equal(heard[..., 3:], exact[..., :21])
    np.testing.assert_array_equal(heard[..., :3], exact[..., :1].repeat(3, axis=-1))
    clips = np.concatenate(list(listen(avatar, SOUND, RELEASE_SINGLE)), axis=-1)
    assert clips.shape == (4, 32, 48)
    streamed = np.concatenate(list(listen(avatar, SOUND, RELEASE_TPP, streaming=True)), axis=-1)
    assert streamed.shape == heard.shape
    pieces = np.concatenate(list(listen(avatar, [SOUND[:5000], SOUND[5000:]], RELEASE_TPP)), axis=-1)
    np.testing.assert_allclose(pieces, streamed, atol=1e-4)


def _rename_partial(folder: Path) -> None:
    folder.rename(folder.with_name("model.partial"))


def _change_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        values = json.loads((folder / "manifest.json").read_text())
        change(values)
        (folder / "manifest.json").write_text(json.dumps(values))

    return prepare


def _truncate(folder: Path) -> None:
    chunk = max((folder / "vae").rglob("c/*"), key=lambda path: path.is_file() and path.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:-100])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    "damaged manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json"),
    "other manifest": (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json"),
    "not complete": (_change_manifest(lambda values: values.update(complete=False)), "not completed"),
    "unlisted component": (_change_manifest(lambda values: values["components"].pop("text")), "no text"),
    "no speech": (lambda folder: shutil.rmtree(folder / "speech"), "model/speech"),
    "no text": (lambda folder: shutil.rmtree(folder / "text"), "model/text"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "model/tokenizer"),
    "empty component": (lambda folder: shutil.rmtree(folder / "dit" / "head.modulation"), "head.modulation"),
    "cut component": (_truncate, "model/vae"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "unfinished": (_rename_partial, "model.partial is a conversion that was not finished"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_costs_one_line(
    folder: Path, models: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, complaint = BROKEN[name]
    shutil.copytree(models["bf16"], "model")
    prepare(Path("model"))
    assert run(lambda: serve.main([*GOOD, "--size", "64x64", "--model", "model"])) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert complaint in err
    assert not Path("out.mp4").exists()


def test_published_folders_must_be_converted_first(
    folder: Path, source: published.Published, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda: serve.main([*GOOD, "--model", str(source.wan)])) == 2
    err = capsys.readouterr().err
    assert f"python tools/convert.py --wan {source.wan} --out Wan2.2-S2V-14B-jax" in err
    assert err.count("\n") == 1


def test_the_size_is_checked_before_anything_is_loaded(
    folder: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lavatar_jax.inference.talk.load_text_encoder", None)
    Image.new("RGB", (4000, 20)).save("face.png")
    assert run(lambda: serve.main([*GOOD, "--size", "64x64", "--model", str(models["bf16"])])) == 2
    assert "cannot be fitted into 4096 pixels" in capsys.readouterr().err


def test_the_converted_config_is_the_published_one(models: dict[str, Path]) -> None:
    config = load_config(models["bf16"])
    assert config.dit == published.DIT_CONFIG
    assert config.vae == published.VAE_CONFIG
    assert config.sampling == RELEASE_TPP
    assert config.speech is not None
    assert config.speech.layers + 1 == config.dit.audio_layers
    assert config.text is not None
    assert config.text.width == config.dit.text_dim
