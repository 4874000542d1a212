import numpy as np
import pytest

from lavatar_jax.data.motion import mouth_from_speech
from lavatar_jax.data.speech import read_wav, write_wav
from lavatar_jax.data.talking_clips import sample_clip
from lavatar_jax.errors import UserError
from lavatar_jax.models.logmel import LogMelConfig, log_mel


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A 'recording' per split whose loudness wanders, so that every passage is unique."""
    folder = tmp_path_factory.mktemp("speech")
    for seed, split in enumerate(("train", "heldout")):
        random = np.random.default_rng(seed)
        level = np.repeat(random.uniform(0.0, 0.2, 50), 1280).astype(np.float32)
        (folder / split).mkdir()
        noise = random.standard_normal(len(level)).astype(np.float32)
        write_wav(folder / split / "00000.wav", level * noise)
    return folder


def test_clip_is_deterministic_and_complete(speech):
    clip = sample_clip(3, 9, 32, "train", speech=speech)
    again = sample_clip(3, 9, 32, "train", speech=speech)
    assert np.array_equal(clip.video, again.video)
    assert np.array_equal(clip.audio, again.audio)
    assert clip.video.shape == (9, 32, 32, 3)
    assert clip.reference.shape == (32, 32, 3)
    assert clip.audio.shape == (1, 192, 8)
    assert clip.samples.shape == (8 * 640,)
    assert clip.motion.mouth_open.shape == (9,)
    assert clip.caption.startswith("a person talking")
    heldout = sample_clip(3, 9, 32, "heldout", speech=speech)
    assert np.abs(heldout.reference - clip.reference).mean() > 0.05


def test_audio_frame_j_drives_video_frame_j_plus_1(speech):
    clip = sample_clip(4, 9, 32, "train", speech=speech)
    whole = read_wav(speech / "train" / "00000.wav")
    features = log_mel(whole, LogMelConfig())
    openness, _ = mouth_from_speech(whole)
    starts = [
        s for s in range(features.shape[-1] - 7) if np.array_equal(features[:, :, s : s + 8], clip.audio)
    ]
    assert len(starts) == 1
    np.testing.assert_array_equal(openness[starts[0] : starts[0] + 8], clip.motion.mouth_open[1:])
    np.testing.assert_array_equal(whole[starts[0] * 640 : (starts[0] + 8) * 640], clip.samples)


def test_wrong_lengths_and_missing_recordings(speech, tmp_path):
    with pytest.raises(ValueError, match="1 \\+ 4k"):
        sample_clip(0, 8, 32, "train", speech=speech)
    with pytest.raises(UserError, match="shorter"):
        sample_clip(0, 1001, 32, "train", speech=speech)
    with pytest.raises(UserError, match="no recordings"):
        sample_clip(0, 9, 32, "train", speech=tmp_path)
