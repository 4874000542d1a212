"""Stage 0 on real videos: `prepare_data.py --pixels`, then a training on what it kept."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavatar_jax.cli import run
from lavatar_jax.config import VAEConfig
from lavatar_jax.data.clips import ClipsConfig
from lavatar_jax.data.loader import ShardSource, record_batches
from lavatar_jax.data.pixels import PixelSource
from lavatar_jax.errors import UserError
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.stages import train
from lavatar_jax.training.vae import VAELossConfig, VAERun
from tests.data.test_pixels import write
from tests.tools.videos import film, speech
from tools import prepare_data

FRAMES = 52  # three clips behind 5 frames of their past
OPTIONS = (
    "--workers", "0", "--blocks", "1", "--motion-frames", "5", "--faces", "any",
    "--filters.seconds", "2", "30", "--filters.reference-gap", "0.5",
)  # fmt: skip
MODEL = VAEConfig(
    kind="wan22", width=8, multipliers=(1, 2), temporal_downsample=(True,), res_blocks=1, patch=4,
    latent_channels=8, latent_mean=(0.0,) * 8, latent_std=(1.0,) * 8,
)  # fmt: skip


def prepare(*args: str | Path) -> int:
    return run(lambda: prepare_data.main([*map(str, args), *OPTIONS]))


def drawing() -> np.ndarray:
    """Red tells the frame, green the column and blue the row."""
    t, y, x = np.meshgrid(np.arange(FRAMES), np.arange(128), np.arange(128), indexing="ij")
    return np.stack([4 * t, x, y], axis=-1).astype(np.uint8)


def run_of(folder: Path, out: Path, **data: object) -> VAERun:
    options = {"clips": 0, "crop_size": 32, "crop_frames": 5, "full_share": 0.0, **data}
    return VAERun(
        out=str(out), model=MODEL, loss=VAELossConfig(), samples=SamplesConfig(records=1),
        data=ClipsConfig(folder=str(folder), **options),
        train=LoopConfig(steps=2, batch=2, log_every=1),
    )  # fmt: skip


def test_stage_0_trains_on_the_frames_of_videos(
    cheap_encoder: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("one.mp4", "two.mp4"):
        film(folder / name, drawing(), speech(FRAMES / 25))
    assert prepare(folder, "--out", out, "--pixels", "10") == 2
    assert (
        "--pixels must be 1 + 4k and at most a clip's 12 frames (--blocks), not 10" in capsys.readouterr().err
    )
    assert prepare(folder, "--out", out, "--pixels", "9") == 0
    source = PixelSource(out, held_out=1)
    assert {size: len(numbers) for size, numbers in source.sizes.items()} == {(9, 128, 128): 3}
    for number, first in enumerate((5, 17, 29)):  # clips end to end behind 5 frames of their past
        red = source[number]["video"][..., 0].mean(axis=(1, 2))
        np.testing.assert_allclose(red, 4 * np.arange(first, first + 9), atol=2)  # of 4 a frame
    face = source.record(0)["face"]
    np.testing.assert_allclose(face, (0.225, 0.275, 0.675, 0.725), atol=0.03)  # a share of 0.45

    batch = next(record_batches(ShardSource(out, text_len=16, text_dim=64), batch=4, seed=0))
    assert not {"pixels", "face"} & batch.keys(), "the transformer's stages leave them where they are"
    assert prepare(folder, "--out", out, "--pixels", "5") == 2
    assert "was made with --pixels 9, not 5" in capsys.readouterr().err

    train(run_of(out, tmp_path / "run"))
    (shown,) = (tmp_path / "run" / "samples").rglob("*.webp")
    with Image.open(shown) as pictures:
        assert pictures.n_frames == 9
        assert pictures.size == (4 * 128, 2 * 128)
        first = np.asarray(pictures.convert("RGB"), np.float32)[::2, ::2]
    truth = PixelSource(out)[5]["video"][0]
    errors = [np.abs(half - truth).mean() for half in (first[:, :128], first[:, 128:])]
    assert errors[0] < 12 < errors[1]  # a VAE of two steps keeps nothing
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("psnr" in line for line in lines)
    (measured,) = (line["evaluation"] for line in lines if "evaluation" in line)
    assert measured["held_out_psnr"] > 0


def test_a_folder_of_before_there_were_pixels_gets_none(
    cheap_encoder: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (folder := tmp_path / "in").mkdir()
    film(folder / "one.mp4", drawing(), speech(FRAMES / 25))
    assert prepare(folder, "--out", tmp_path / "out") == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    del settings["pixels"]
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    assert prepare(folder, "--out", tmp_path / "out") == 0
    assert prepare(folder, "--out", tmp_path / "out", "--pixels", "9") == 2
    assert "was made with --pixels 0, not 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"crop_frames": 13}, r"--data\.crop-frames 13 is larger than the clips, which have 9"),
        ({"crop_size": 256}, r"--data\.crop-size 256 is larger than the clips, which have 120"),
        ({"crop_size": 20}, r"--data\.crop-size must be a multiple of 8 pixels, not 20"),
        ({"full_share": 0.2}, r"sides are no multiples of 16 pixels: train on crops of them, and show none"),
        ({}, r"sides are no multiples of 16 pixels"),  # of what is held out
    ],
)
def test_crops_that_do_not_fit_are_refused(tmp_path: Path, data: dict[str, float], message: str):
    """Also where `--data.clips` says how many to render, if it were no folder of videos."""
    write(tmp_path / "records", sizes=((9, 120, 256), (9, 256, 120)))
    config = run_of(tmp_path / "records", tmp_path / "run", clips=5, **data)
    patch = 8 if "size" in message or "frames" in message else 16
    model = dataclasses.replace(MODEL, patch=patch // 2)
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(config, model=model))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_videos_says_what_to_do(tmp_path: Path):
    (tmp_path / "rendered.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no pictures of videos: prepare them with tools/prepare_data"):
        train(run_of(tmp_path, tmp_path / "run"))
