"""Driving poses beside videos: which are taken, how they are cut and encoded, and which records have them."""

import itertools
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.cli import run
from lavatar_jax.data.clip_filters import FilterConfig
from lavatar_jax.data.loader import ShardSource, record_batches
from lavatar_jax.data.records import Record
from lavatar_jax.data.shards import read_manifest
from lavatar_jax.inference.images import load_image
from lavatar_jax.inference.pose import PoseEncoder
from tests.tiny import random_vae, tiny_vae_config
from tests.tools.videos import film, speech
from tools import prepare_data
from tools.real_encode import ClipEncoder

FRAMES = 52  # three clips behind 5 frames of their past
OPTIONS = (
    "--workers", "0", "--blocks", "1", "--motion-frames", "5", "--faces", "detector_of_poses:detect",
    "--filters.seconds", "2", "30", "--filters.reference-gap", "0.5",
)  # fmt: skip
NEAR = 0.01  # of 2: a third of a frame's step, or one and a half pixels


@pytest.fixture(autouse=True)
def face_at_the_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is cut out of a picture of 256 x 192 is 111 pixels high, 29 from the left and 15 from the top."""
    (tmp_path / "detector_of_poses.py").write_text(
        "from lavatar_jax.data.clip_filters import Box\n"
        "def detect(picture):\n"
        "    return [Box(60, 40, 50, 50)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def drawing(frames: int = FRAMES, height: int = 192, width: int = 256) -> np.ndarray:
    """Red tells the frame, green the column and blue the row: uint8 [frames, height, width, 3]."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([4 * t, 240 * x // width, 240 * y // height], axis=-1).astype(np.uint8)


def prepare(*args: str | Path) -> int:
    return run(lambda: prepare_data.main([*map(str, args), *OPTIONS]))


def records(out: Path) -> dict[str, list[Record]]:
    """The records of each video."""
    source = ShardSource(out, text_len=16, text_dim=64)
    found: dict[str, list[Record]] = {}
    for number, row in enumerate(read_manifest(out)):
        found.setdefault(row["video"], []).append(source.record(number))
    return found


def told(out: Path) -> dict[str, list[str]]:
    """What was odd about videos, or why they were dropped."""
    lines = map(json.loads, (out / "videos.jsonl").read_text().splitlines())
    return {
        line["name"]: [note for note in line["notes"] if note != "no caption"]
        + [reason for _, reason in line["dropped"]]
        for line in lines
    }


def test_poses_are_cut_like_their_videos_and_in_step(
    cheap_encoder: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Each pose shows what its video shows, so that every record must have two latents of the same."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    picture, sound = drawing(), speech(FRAMES / 25)
    same = film(folder / "same.mp4", picture, sound)
    shutil.copy(same, folder / "same.pose.mp4")
    with tarfile.open(folder / "web.tar", "w") as tar:
        tar.add(same, "000.mp4")
        tar.add(same, "000.pose.mp4")
    shutil.copy(same, folder / "half.mp4")
    film(folder / "half.POSE.mkv", drawing(height=96, width=128).repeat(2, axis=0), None, fps=50)
    film(folder / "fast.mkv", picture.repeat(2, axis=0), sound, fps=50)
    film(folder / "fast.pose.mp4", picture.repeat(2, axis=0), None, fps=30)  # as many frames
    shutil.copy(same, folder / "bare.mp4")

    assert prepare(folder, "--out", out) == 0
    found = records(out)
    assert {name: len(of) for name, of in found.items()} == dict.fromkeys(
        ("same.mp4", "half.mp4", "fast.mkv", "bare.mp4", "web.tar/000.mp4"), 3
    )
    assert not any(told(out).values())
    assert not any("pose" in record for record in found.pop("bare.mp4"))
    first = found["same.mp4"][0]["pose"].astype(np.float32)
    # Frames 8, 12 and 16; columns 29 + 55 and rows 15 + 55 are in the middle of the cut.
    assert (
        np.abs(first[:, 7:9, 7:9, 0].mean(axis=(1, 2)) - (np.array([32, 48, 64]) / 127.5 - 1)).max()
        < 2 * NEAR
    )
    assert np.abs(first[:, 7:9, 7:9, 1].mean() - (240 * 84.5 / 256 / 127.5 - 1)) < 2 * NEAR
    assert np.abs(first[:, 7:9, 7:9, 2].mean() - (240 * 70.5 / 192 / 127.5 - 1)) < 2 * NEAR
    for name, of in found.items():
        for record in of:
            difference = record["pose"].astype(np.float32) - record["latent"].astype(np.float32)
            again_encoded = name in ("half.mp4", "fast.mkv")
            assert np.abs(difference).max() <= (0.05 if again_encoded else 0), name
            assert np.abs(difference.mean(axis=(1, 2))).max() < NEAR, name

    assert "15 records (12 with poses) of 5 videos, 0 of no use" in " ".join(capsys.readouterr().out.split())
    assert "<b>12</b> records have a driving pose" in (out / "report.html").read_text()
    heights = [len(load_image(path)) for path in (out / "pictures").iterdir()]
    assert sorted(heights) == [112, 224, 224, 224, 224]  # a piece each, with the poses below
    source = ShardSource(out, text_len=16, text_dim=64)
    assert sorted(len(bucket.records) for bucket in source.buckets) == [3, 12]
    batches = list(itertools.islice(record_batches(source, batch=3, seed=0), 5))  # an epoch
    assert sorted("pose" in batch for batch in batches) == [False, True, True, True, True]
    posed = next(batch for batch in batches if "pose" in batch)
    numbers = posed["record"]
    raw = np.stack([source.record(int(number))["pose"] for number in numbers]).astype(np.float32)
    np.testing.assert_allclose(posed["pose"], (raw - source.mean) / source.std, atol=1e-6)


def test_a_pose_of_no_use_is_named_and_its_video_kept_without(
    cheap_encoder: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    video = film(tmp_path / "video.mp4", drawing(), speech(FRAMES / 25))
    good = film(tmp_path / "good.mp4", drawing(), None)
    poses = {
        "text": b"no video",
        "empty": b"",
        "cut off": good.read_bytes()[: good.stat().st_size // 2],
        "short": film(tmp_path / "short.mp4", drawing(FRAMES - 6), None).read_bytes(),
        "long": film(tmp_path / "long.mp4", drawing(FRAMES + 6), None).read_bytes(),
        "wide": film(tmp_path / "wide.mp4", drawing(width=264), None).read_bytes(),
        "ends early": film(tmp_path / "early.mp4", drawing(FRAMES - 5), None).read_bytes(),
        "good": good.read_bytes(),
    }
    for name, data in poses.items():
        shutil.copy(video, folder / f"{name}.mp4")
        (folder / f"{name}.pose.mp4").write_bytes(data)
    shutil.copy(good, folder / "alone.pose.mp4")

    assert prepare(folder, "--out", out) == 0
    unreadable, length = "pose is not a video, or damaged", "pose is shorter or longer than the video"
    expected = {
        "alone.pose.mp4": ["a pose without its video"],
        "text.mp4": [unreadable],
        "empty.mp4": [unreadable],
        "cut off.mp4": [unreadable],
        "short.mp4": [length],
        "long.mp4": [length],
        "wide.mp4": ["pose has other proportions than the video"],
        "ends early.mp4": [],
        "good.mp4": [],
    }
    assert told(out) == expected
    page = (out / "report.html").read_text()
    assert f"<td>{unreadable}</td><td><details><summary>3</summary>" in page
    assert f"<td>{length}</td><td><details><summary>2</summary>" in page
    found = records(out)
    assert [len(of) for of in found.values()] == [3] * 8
    assert {name for name, of in found.items() if "pose" in of[0]} == {"good.mp4", "ends early.mp4"}

    before = (out / "manifest.jsonl").read_bytes()
    assert prepare(folder, "--out", out) == 0  # nothing has changed
    assert (out / "manifest.jsonl").read_bytes() == before
    assert told(out) == expected
    capsys.readouterr()
    shutil.copy(good, folder / "text.pose.mp4")
    (folder / "short.pose.mp4").unlink()
    shutil.copy(video, folder / "alone.mp4")
    assert prepare(folder, "--out", out) == 0
    assert "1 videos have captions or poses now" in capsys.readouterr().out
    after = records(out)
    posed = {name for name, of in after.items() if all("pose" in record for record in of)}
    assert posed == {"alone.mp4", "ends early.mp4", "good.mp4", "text.mp4"}
    assert {name: len(of) for name, of in after.items()} == dict.fromkeys((*found, "alone.mp4"), 3)
    assert told(out) == {name: notes for name, notes in expected.items() if name != "alone.pose.mp4"} | {
        "text.mp4": [],
        "alone.mp4": [],
    }
    assert "<b>12</b> records have a driving pose" in (out / "report.html").read_text()


def test_poses_that_come_later_are_taken(cheap_encoder: None, tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    video = film(folder / "a.mp4", drawing(), speech(FRAMES / 25))
    assert prepare(folder, "--out", out) == 0
    journal = [json.loads(line) for line in (out / "videos.jsonl").read_text().splitlines()]
    for entry in journal:
        del entry["pose"]  # as earlier versions wrote it
    (out / "videos.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in journal))
    before = {row["id"] for row in read_manifest(out)}
    shutil.copy(video, folder / "a.pose.mp4")
    assert prepare(folder, "--out", out) == 0
    assert {row["id"] for row in read_manifest(out)} == before
    assert all("pose" in record for record in records(out)["a.mp4"])


def test_poses_are_encoded_as_when_a_video_is_made():
    """Five blocks are more than a clip of the sampler, which begins anew."""
    vae = random_vae(tiny_vae_config())
    side, frames = 2 * vae.config.spatial_factor, 60
    poses = np.random.default_rng(0).integers(0, 255, (frames, side, side, 3)).astype(np.uint8)
    encoder = ClipEncoder("tiny", blocks=5, motion_frames=5, filters=FilterConfig())
    assert encoder.config.sampling.clip_blocks == 4
    encoder._vae = vae
    inference = PoseEncoder(vae, [poses], 4, height=side, width=side)
    normal = np.concatenate([np.asarray(latent[0]) for latent in itertools.islice(inference, 5)])
    raw = normal * np.array(vae.config.latent_std) + np.array(vae.config.latent_mean)
    got = encoder.encode_pose(poses)
    assert got.shape == (15, 2, 2, 3)
    np.testing.assert_allclose(got, raw, atol=1e-5)
