import jax
import numpy as np
import pytest

from lavatar_jax.data.faces import Motion, draw_identity, render
from lavatar_jax.data.motion import Manner, talking_motion
from lavatar_jax.evaluation.metrics import (
    colour_error,
    correlation,
    count_blinks,
    lag_correlations,
    mouth_box,
    peak_lag,
    psnr,
    recognise_manner,
    shuffled_correlation,
    variance_ratio,
)  # fmt: skip
from lavatar_jax.evaluation.probe import FaceProbe
from lavatar_jax.evaluation.sheet import contact_sheet, save_sheet

SIZE = 64


def openness_track(seed, frames=75):
    noise = np.random.default_rng(seed).standard_normal(frames + 4)
    return np.clip(0.4 + 0.5 * np.convolve(noise, np.ones(5) / 5**0.5, "valid") * 0.8, 0, 1).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def talking():
    identity = jax.jit(lambda i: draw_identity(i, "heldout"))(7)
    track = openness_track(0)
    motion = talking_motion(
        track, np.full(len(track), 0.5, np.float32), Manner(smile="smiling", head="lively"), 3
    )
    blink = np.zeros(len(track), np.float32)
    blink[[20, 50]], blink[[19, 21, 49, 51]] = 1.0, 0.5
    motion = Motion(**{**vars(motion), "blink": jax.numpy.asarray(blink)})
    video = np.asarray(jax.jit(lambda i, m: render(i, m, SIZE))(identity, motion))
    return identity, motion, video


def test_probe_qualifies_on_ground_truth(talking):
    identity, motion, video = talking
    reading = FaceProbe.calibrate(identity, SIZE, count=320).measure(video)
    assert correlation(reading.mouth_open, motion.mouth_open) > 0.97
    assert np.abs(reading.mouth_open - np.asarray(motion.mouth_open)).mean() < 0.06
    assert count_blinks(reading.blink) == 2
    assert np.abs(reading.head_x - np.asarray(motion.head_x)).max() < 0.01
    assert recognise_manner(reading) == Manner(smile="smiling", head="lively")


def test_colour_error_knows_the_person(talking):
    identity, _, video = talking
    own = colour_error(video, identity)
    assert {name: error.shape for name, error in own.items()}["skin"] == (len(video),)
    assert max(error.mean() for error in own.values()) < 3.0
    other = colour_error(video, draw_identity(8, "heldout"))
    assert np.mean([error.mean() for error in other.values()]) > 25.0
    shifted = colour_error(video + 10 / 127.5, identity)
    assert shifted["background"].mean() == pytest.approx(10.0, abs=1.5)


def test_mouth_box_surrounds_the_moving_mouth(talking):
    identity, motion, video = talking
    box = np.asarray(mouth_box(identity, motion, SIZE))
    closed = Motion(**{**vars(motion), "mouth_open": 0.0 * motion.mouth_open})
    change = np.abs(np.asarray(jax.jit(lambda i, m: render(i, m, SIZE))(identity, closed)) - video).sum(-1)
    assert (change * box[..., 0]).sum() > 0.85 * change.sum()
    assert 0.02 < box.mean() < 0.15


def test_lags_and_controls():
    tracks = [openness_track(seed) for seed in range(6)]
    late = [np.roll(track, 2) for track in tracks]
    assert peak_lag(late, tracks) == 2
    assert lag_correlations(tracks[0], tracks[0])[0] == pytest.approx(1.0)
    assert abs(shuffled_correlation(tracks, tracks)) < 0.1
    assert variance_ratio(0.5 * tracks[0], tracks[0]) == pytest.approx(0.25)
    assert correlation(np.ones(10), np.arange(10)) == 0.0


def test_psnr_and_blinks():
    video = np.zeros((1, 8, 8, 3), np.float32)
    assert psnr(video + 0.2, video) == pytest.approx(20.0)
    weights = np.zeros((1, 8, 8, 1))
    weights[:, 2:4, 2:4] = 1.0
    damaged = video.copy()
    damaged[:, 2:4, 2:4] = 0.2
    assert psnr(damaged, video, weights) == pytest.approx(20.0)
    assert count_blinks([0, 0.7, 0.5, 0.7, 0.2, 0.9, 0]) == 2


def test_sheet(tmp_path):
    rows = [("a face", np.full((3, 8, 8, 3), 1.0)), ("", np.full((2, 8, 8, 3), -1.0))]
    assert contact_sheet(rows, scale=2).size == (3 * 18, 14 + 2 * 18)
    save_sheet(rows, tmp_path / "sheet.png")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
