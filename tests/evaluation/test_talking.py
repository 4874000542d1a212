"""What is said of videos: the truth is perfect, and what is changed about it shows in the right number."""

import dataclasses

import jax
import numpy as np
import pytest

from lavatar_jax.data.faces import draw_identity, render
from lavatar_jax.data.motion import Manner, talking_motion
from lavatar_jax.data.talking_clips import Clip
from lavatar_jax.evaluation.probe import FaceProbe
from lavatar_jax.evaluation.talking import over_seeds, probe_numbers, speech_numbers

SIZE, FRAMES = 96, 97


def people() -> list[Clip]:
    draw = jax.jit(lambda identity, motion: render(identity, motion, SIZE))
    clips = []
    for index, manner in enumerate((Manner(head="lively"), Manner(smile="smiling", head="still"))):
        random = np.random.default_rng(index)
        openness = np.clip(np.convolve(random.normal(0.4, 0.6, FRAMES), np.ones(4) / 4, "same"), 0, 1)
        motion = talking_motion(openness.astype(np.float32), np.full(FRAMES, 0.5, np.float32), manner, index)
        identity = draw_identity(index, "heldout")
        clip = Clip(
            video=np.asarray(draw(identity, motion)), reference=np.zeros((SIZE, SIZE, 3), np.float32),
            audio=np.zeros((1, 1, FRAMES - 1), np.float32), samples=np.zeros(0, np.float32),
            motion=motion, identity=identity, manner=manner, split="heldout", index=index,
        )  # fmt: skip
        clips.append(clip)
    return clips


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return people()


@pytest.fixture(scope="module")
def probes(clips: list[Clip]) -> list[FaceProbe]:
    return [FaceProbe.calibrate(clip.identity, SIZE) for clip in clips]


def test_the_truth_is_perfect(clips: list[Clip], probes: list[FaceProbe]) -> None:
    numbers = speech_numbers([clip.video[1:] for clip in clips], clips, probes)
    assert numbers["openness_worst"] > 0.97
    assert numbers["lag"] == 0
    assert [numbers[name] for name in ("openness_variance", "head_motion", "sharpness")] == pytest.approx(
        [1] * 3
    )
    assert numbers["blinks"] == numbers["partial_blinks"] == numbers["true_blinks"] > 0
    assert numbers["smile_as_asked"] == numbers["head_as_asked"] == 1.0


def test_what_is_changed_shows(clips: list[Clip], probes: list[FaceProbe]) -> None:
    late = speech_numbers([np.roll(clip.video[1:], 3, axis=0) for clip in clips], clips, probes)
    assert abs(late["lag"]) == 3
    assert late["openness"] < 0.9
    frozen = speech_numbers([np.repeat(clip.video[5:6], 60, axis=0) for clip in clips], clips, probes)
    assert frozen["openness_variance"] < 0.01
    assert frozen["head_motion"] < 0.01
    assert frozen["blinks"] == 0
    assert frozen["head_as_asked"] == 0.5, "only one of them was asked to keep still"


def test_lids_that_half_close_are_told_from_blinks(clips: list[Clip], probes: list[FaceProbe]) -> None:
    draw = jax.jit(lambda identity, motion: render(identity, motion, SIZE))
    sleepy = [
        np.asarray(draw(clip.identity, dataclasses.replace(clip.motion, blink=0.45 * clip.motion.blink)))
        for clip in clips
    ]
    numbers = speech_numbers([video[1:] for video in sleepy], clips, probes)
    assert numbers["blinks"] == 0
    assert numbers["partial_blinks"] == numbers["true_blinks"]


def test_the_probe_itself_is_qualified(clips: list[Clip], probes: list[FaceProbe]) -> None:
    numbers = probe_numbers(clips, probes)
    assert numbers["probe_openness"] > 0.97
    assert numbers["probe_openness_variance"] == pytest.approx(1.0, abs=0.15)
    assert numbers["probe_head_motion"] == pytest.approx(1.0, abs=0.15)
    assert numbers["probe_smile_as_asked"] == numbers["probe_head_as_asked"] == 1.0


def test_numbers_of_several_noises_are_told_with_their_spread() -> None:
    runs = [{"blinks": 8.0, "lag": 0.0}, {"blinks": 10.0, "lag": 0.0}]
    assert over_seeds(runs) == ({"blinks": 9.0, "lag": 0.0}, {"blinks": 1.0, "lag": 0.0})
    assert over_seeds(runs[:1]) == ({"blinks": 8.0, "lag": 0.0}, {})
