import numpy as np
import pytest
from flax import nnx

from lavatar_jax.inference import speech_features as sf
from lavatar_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config

MODEL = Wav2Vec2(
    Wav2Vec2Config(
        layers=1, width=8, heads=2, ffn_width=8, conv_width=(4,) * 7, position_kernel=4, position_groups=2
    ),
    rngs=nnx.Rngs(0),
)


def noise(count, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def test_normalised_sound_has_mean_0_and_variance_1():
    sound = sf.normalise(0.3 * noise(5000) + 0.2)
    assert sound.dtype == np.float32
    assert sound.mean() == pytest.approx(0, abs=1e-5)
    assert sound.std() == pytest.approx(1, rel=1e-3)
    assert not sf.normalise(np.zeros(100, np.float32)).any()
    assert len(sf.normalise(np.zeros(0, np.float32))) == 0


def test_resampling_keeps_both_ends():
    states = noise(2 * 100 * 3).reshape(2, 100, 3)
    resampled = sf.resample(states)
    assert resampled.shape == (2, 60, 3)
    assert np.array_equal(resampled[:, 0], states[:, 0])
    np.testing.assert_allclose(resampled[:, -1], states[:, -1], atol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 4, 35, 50, 106, 149, 15_001])
def test_resampling_is_that_of_torch(count):
    torch = pytest.importorskip("torch")
    states = noise(2 * count * 3).reshape(2, count, 3)
    wanted = int(count / 50.0 * 30)
    want = torch.nn.functional.interpolate(
        torch.from_numpy(states.transpose(0, 2, 1).copy()), size=wanted, mode="linear", align_corners=True
    )
    np.testing.assert_allclose(sf.resample(states), want.numpy().transpose(0, 2, 1), atol=1e-6)


@pytest.mark.parametrize(("count", "clips"), [(0, 1), (57, 1), (58, 2), (115, 2), (116, 3)])
def test_there_is_always_a_clip_more(count, clips):
    """48 frames are 57.6 of 30 a second."""
    indices = sf.video_indices(count, 48)
    assert len(indices) == 48 * clips
    assert indices[:11].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12]


def test_picking_gives_zeros_behind_the_end_and_the_ends_as_neighbours():
    states = np.arange(1.0, 6.0, dtype=np.float32).reshape(1, 5, 1)
    picked = sf.pick(states, np.array([0, 2, 4, 5]), around=1, stride=2)
    assert picked[0].tolist() == [[1, 1, 3], [1, 3, 5], [3, 5, 5], [0, 0, 0]]
    assert sf.pick(states[:, :0], np.array([0, 1])).tolist() == [[[0], [0]]]


def test_features_are_zero_after_the_recording():
    seconds = 2
    features = sf.speech_features(MODEL, noise(16_000 * seconds), 48)
    assert features.shape == (2, 8, 96)
    active = features.any(axis=(0, 1))
    # 99 frames of the network become 59 of 30 a second, which last for 50 video frames (k = 49 takes 59).
    assert np.array_equal(np.flatnonzero(active), np.arange(49))


@pytest.mark.parametrize("count", [0, 1, 399, 400, 1000])
def test_recordings_that_are_too_short_are_silence(count):
    features = sf.speech_features(MODEL, noise(count), 48)
    assert features.shape == (2, 8, 48)
    assert features.any() == (count >= 1000)


def test_another_frame_rate_picks_others():
    assert sf.video_indices(30, 16, fps=30).tolist() == list(range(32))
    assert sf.speech_features(MODEL, noise(17_000), 16, fps=16).shape == (2, 8, 32)
