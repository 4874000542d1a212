import numpy as np

from lavatar_jax.data.motion import MANNERS, Manner, blink_track, mouth_from_speech, talking_motion
from lavatar_jax.evaluation.metrics import blinks_per_minute, head_deviation


def vowels(seconds=4.0, rate=4.0, level=0.12):
    """A 120 Hz buzz whose loudness beats like syllables, silent in its second half."""
    t = np.arange(int(seconds * 16_000)) / 16_000
    buzz = sum(np.sin(2 * np.pi * 120 * k * t) / k**0.5 for k in range(1, 20))
    beats = np.maximum(np.sin(2 * np.pi * rate * t), 0.0)
    return (level * buzz * beats * (t < seconds / 2)).astype(np.float32)


def test_silence_closes_the_mouth_and_rests_the_lips():
    openness, width = mouth_from_speech(np.zeros(16_000, np.float32))
    assert len(openness) == 25
    assert np.all(openness == 0.0)
    assert np.all(width == 0.5)
    faint = 1e-3 * np.random.default_rng(0).standard_normal(16_000)
    assert mouth_from_speech(faint.astype(np.float32))[0].max() == 0.0


def test_mouth_follows_the_syllables():
    openness, _ = mouth_from_speech(vowels())
    assert openness[:48].max() > 0.6
    assert np.ptp(openness[5:45]) > 0.5
    assert openness[52:].max() < 0.01


def test_mouth_looks_at_most_two_frames_ahead_and_one_back():
    samples = vowels()
    changed = samples.copy()
    changed[20 * 640 : 21 * 640] = 0.0
    difference = np.abs(mouth_from_speech(samples)[0] - mouth_from_speech(changed)[0])
    touched = np.flatnonzero(difference > 1e-6)
    assert touched.min() >= 18
    assert touched.max() <= 22  # the windows end with their hop but reach one hop and a half back


def test_blinks_are_as_frequent_as_people_blink():
    tracks = [blink_track(np.random.default_rng(seed), 1500) for seed in range(40)]
    assert 15 < np.mean([blinks_per_minute(track) for track in tracks]) < 19


def test_manners_differ_in_caption_and_movement():
    assert len({manner.caption for manner in MANNERS}) == 6
    openness, width = mouth_from_speech(vowels())
    motions = {
        head: talking_motion(openness, width, Manner(head=head), 1) for head in ("still", "normal", "lively")
    }
    still, normal, lively = (head_deviation(motion) for motion in motions.values())
    assert 2 * still < normal < 0.7 * lively
    again = talking_motion(openness, width, Manner(head="still"), 1)
    assert np.array_equal(again.head_x, motions["still"].head_x)
    other = talking_motion(openness, width, Manner(head="still"), 2)
    assert not np.array_equal(again.head_x, other.head_x)
