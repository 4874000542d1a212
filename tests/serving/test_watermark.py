"""The mark is invisible, found after H.264 and scaling, and not found where it is not."""

import math

import numpy as np
import pytest
from PIL import Image

from lavatar_jax.errors import UserError
from lavatar_jax.inference.generate import SAMPLES
from lavatar_jax.serving.watermark import Watermark
from tools.measure_watermark import scaled, through_h264

SIZE = 512


def talking_face(count: int = 12) -> np.ndarray:
    """The sample face, swaying, its lower half brightening and darkening: [T, H, W, 3]."""
    with Image.open(SAMPLES / "face.png") as image:
        face = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    frames = np.stack([np.roll(face, t // 2, axis=1) for t in range(count)])
    for t in range(count):
        frames[t, 300:380, 200:320] //= 1 + t % 3
    return frames


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return talking_face()


@pytest.fixture(scope="module")
def marked(face: np.ndarray) -> np.ndarray:
    return Watermark().embed(face)


def test_it_is_invisible(face: np.ndarray, marked: np.ndarray) -> None:
    error = np.mean((marked.astype(float) - face) ** 2)
    assert 42 <= 10 * math.log10(255**2 / error) < 50
    assert np.abs(marked.astype(int) - face).max() <= 12


@pytest.mark.parametrize(
    "options",
    [{"crf": "18"}, {"b": "600k", "tune": "zerolatency"}, {"b": "300k", "tune": "zerolatency"}],
    ids=lambda options: next(iter(options.values())),
)
def test_it_survives_h264(face: np.ndarray, marked: np.ndarray, options: dict[str, str]) -> None:
    assert Watermark().detect(through_h264(marked, **options)).present
    assert not Watermark().detect(through_h264(face, **options)).present


def test_it_survives_scaling(marked: np.ndarray) -> None:
    smaller = scaled(marked, 480)
    assert Watermark().detect(smaller).present
    assert Watermark().detect(scaled(smaller, SIZE)).present


def test_one_frame_is_enough(marked: np.ndarray) -> None:
    assert Watermark().detect(marked[:1]).present


def test_other_keys_do_not_find_it(marked: np.ndarray) -> None:
    detections = [Watermark(key=b"%d" % key).detect(marked[:1]) for key in range(20)]
    assert not any(detection.present for detection in detections)
    scores = [detection.score for detection in detections]
    assert 0.5 < np.std(scores) < 1.6  # the unit of a score is the deviation without the mark
    assert all(0 < detection.false_alarm <= 1 for detection in detections)


def test_pictures_without_detail_are_not_marked() -> None:
    for level in (0, 255):
        detection = Watermark().detect(np.full((2, 64, 64, 3), level, np.uint8))
        assert (detection.present, detection.false_alarm) == (False, 1.0)


@pytest.mark.parametrize("level", [0, 1, 254, 255])
def test_black_and_white_do_not_wrap_around(level: int) -> None:
    marked = Watermark(strength=3.0).embed(np.full((1, 128, 160, 3), level, np.uint8))
    assert np.abs(marked.astype(int) - level).max() < 30


def test_marking_in_blocks_leaves_the_input_alone(face: np.ndarray, marked: np.ndarray) -> None:
    assert np.array_equal(face, talking_face())
    blocks = np.concatenate([Watermark().embed(face[start : start + 5]) for start in range(0, 12, 5)])
    assert Watermark().detect(blocks).score == pytest.approx(Watermark().detect(marked).score, rel=0.1)
    assert Watermark().embed(face[:0]).shape == (0, SIZE, SIZE, 3)


def test_still_regions_do_not_upset_the_detector(face: np.ndarray) -> None:
    """Running sums leave tiny negative variances behind hard edges."""
    frame = face[0].copy()
    frame[:, ::64] = 255
    frame[200:] = 113
    assert math.isfinite(Watermark().detect([frame]).score)


def test_small_frames_are_refused() -> None:
    with pytest.raises(UserError, match="enlarge"):
        Watermark().embed(np.zeros((1, 64, 64, 3), np.uint8))


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(Watermark(key=b"secret"))
