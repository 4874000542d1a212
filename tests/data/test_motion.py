import numpy as np
import pytest

from lavatar_jax.data.motion import (
    MANNERS,
    Manner,
    blink_track,
    head_response,
    mouth_from_speech,
    talking_motion,
)
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


def test_the_head_follows_the_voice_after_it():
    """An impulse moves the head at its own frame at the earliest, most strongly some frames later."""
    track = np.zeros(40, np.float32)
    track[10] = 1.0
    response = head_response(track)
    assert np.all(response[:10] == 0.0)
    assert 1 <= np.argmax(response) - 10 <= 3
    assert response.sum() == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(head_response(np.full(9, 0.4, np.float32)), 0.4, rtol=1e-5)

    random = np.random.default_rng(0)
    openness, width = random.random((2, 400)).astype(np.float32)
    nods = [
        np.corrcoef(talking_motion(openness, width, Manner(head=head), seed).head_y, head_response(openness))[
            0, 1
        ]
        for seed in range(8)
        for head in ("still", "normal", "lively")
    ]
    assert 0.6 < np.mean(nods) < 0.98


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
