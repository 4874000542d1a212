"""Faces are found, pictures become latents, and some references are in another light."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavatar_jax.data.clip_filters import FilterConfig
from lavatar_jax.data.face_boxes import load_detector
from tests.tools.videos import FRAMES, speech
from tools import real_encode
from tools.real_clips import Outcome, Piece
from tools.real_encode import ClipEncoder

ROOT = Path(__file__).resolve().parents[2]


def test_haar_finds_the_face_of_the_sample_photo():
    pytest.importorskip("cv2", reason="finding faces needs opencv-python-headless")
    photo = np.asarray(Image.open(ROOT / "lavatar_jax" / "samples" / "face.png").convert("RGB"))
    detect = load_detector("haar")
    (box,) = detect(photo)
    height, width = photo.shape[:2]
    assert abs(box.left + box.width / 2 - width / 2) < 0.1 * width
    assert 0.3 * height < box.height < 0.8 * height
    assert len(detect(np.concatenate([photo, photo], axis=1))) == 2
    assert detect(np.full_like(photo, 90)) == []
    assert detect(np.zeros((1, 3000, 3), np.uint8)) == []


def test_the_shipped_model_encodes_a_clip(
    faces: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pictures = np.stack([np.asarray(Image.fromarray(f).resize((128, 128))) for f in faces[0]])
    piece = Piece(
        start=0, frames=tmp_path / "0.npy", samples=tmp_path / "0.sound.npy", face=100.0, level_db=-20.0,
        place=(0.25, 0.25, 0.75, 0.75),
    )  # fmt: skip
    np.save(piece.frames, pictures)
    np.save(piece.samples, speech(FRAMES / 25))
    seen: list[np.ndarray] = []
    encode = real_encode._encode
    monkeypatch.setattr(
        real_encode, "_encode", lambda vae, video: (seen.append(video), encode(vae, video))[1]
    )
    encoder = ClipEncoder("tiny", blocks=1, motion_frames=1, filters=FilterConfig(), other_light=1.0)
    assert encoder.sizes == ((128, 128),)
    frame, record = next(encoder.records(Outcome("a.mp4", caption="smiling"), piece, set()))
    assert frame == 1
    assert record["latent"].shape == (3, 16, 16, 16)
    assert record["audio"].shape == (1, 192, 12)
    # Raw means of people that the model knows have about its statistics.
    mean, std = np.array(encoder.config.vae.latent_mean), np.array(encoder.config.vae.latent_std)
    normal = (record["latent"].astype(np.float32) - mean) / std
    assert 0.5 < normal.std() < 2
    (photo,) = seen[1]  # of the same person at another time, in another light
    assert not (photo == pictures).all(axis=(1, 2, 3)).any()


def test_some_references_are_in_another_light():
    photo = np.random.default_rng(0).integers(40, 200, (8, 8, 3), np.uint8)
    names = [f"clip-{number}" for number in range(400)]
    changed = [real_encode.perturbed(photo, name, 0.25) for name in names]
    different = [picture for picture in changed if (picture != photo).any()]
    assert 60 < len(different) < 140
    assert len({picture.mean() for picture in different}) > 50
    for name, picture in zip(names, changed, strict=True):
        np.testing.assert_array_equal(real_encode.perturbed(photo, name, 0.25), picture, strict=True)
    assert (real_encode.perturbed(photo, names[0], 0.0) == photo).all()
