"""Held-out people on the shipped model: a glimpse into a long video shows what the whole video shows."""

import dataclasses

import jax
import numpy as np
import pytest

from lavatar_jax.checkpoints.store import load_model_folder
from lavatar_jax.data.faces import draw_identity, neutral_motion, render
from lavatar_jax.data.motion import Manner
from lavatar_jax.data.talking_clips import Clip
from lavatar_jax.evaluation import performance
from lavatar_jax.evaluation.metrics import colour_error, flicker
from lavatar_jax.evaluation.talking import colour_numbers, identity_error

BLOCKS = 14


@pytest.fixture(scope="module")
def avatar():
    return load_model_folder("tiny")


@pytest.fixture(scope="module")
def clip(avatar) -> Clip:
    """A silent person who does not move."""
    frames = 1 + 12 * BLOCKS
    identity = jax.jit(lambda i: draw_identity(i, "heldout"))(3)
    motion = neutral_motion(frames)
    picture = np.asarray(jax.jit(lambda i, m: render(i, m, 128))(identity, neutral_motion(1)))[0]
    mel = avatar.config.log_mel
    return Clip(
        video=np.broadcast_to(picture, (frames, *picture.shape)),
        reference=picture,
        audio=np.random.default_rng(0).standard_normal((1, mel.dim, frames - 1)).astype(np.float32),
        samples=np.zeros((frames - 1) * 640, np.float32),
        motion=motion,
        identity=identity,
        manner=Manner(),
        split="heldout",
        index=3,
    )


def test_a_glimpse_is_what_the_decoded_video_shows(avatar, clip, monkeypatch) -> None:
    def audio(avatar, people, seconds, speech):
        return performance.clip_audio(avatar, [clip] * people)

    monkeypatch.setattr(performance, "endless_audio", audio)
    whole = np.concatenate([b.frames for b in performance.stream(avatar, [clip], audio(avatar, 1, 0, ""))], 1)
    seen = dict(performance.glimpses(avatar, [clip], None, 0, [5.5, 13 * 0.48], window=0.48))
    assert list(seen) == [5.5, 13 * 0.48]
    np.testing.assert_allclose(seen[5.5], whole[:, 120:132], atol=1e-5)  # the block that ends at 5.28 s
    np.testing.assert_allclose(seen[13 * 0.48], whole[:, 144:156], atol=1e-5)


def test_blocks_may_have_another_length(avatar, clip) -> None:
    shorter = performance.with_sampling(avatar, block_frames=1, steps=2)
    assert shorter.dit.config.block_frames == 1
    assert performance.block_seconds(shorter) == pytest.approx(0.16)
    audio = list(performance.clip_audio(shorter, [clip]))[:2]
    assert [b.frames.shape for b in performance.stream(shorter, [clip], audio)] == [(1, 4, 128, 128, 3)] * 2


def test_the_truth_has_no_colour_error_and_does_not_flicker(clip) -> None:
    other = dataclasses.replace(clip, identity=jax.jit(lambda i: draw_identity(i, "heldout"))(4))
    numbers = colour_numbers([clip.video, clip.video], [clip, clip])
    assert numbers["colour"] < 1.5
    assert numbers["flicker"] == 0
    assert identity_error(clip.video, other) > 10
    noise = np.random.default_rng(1).normal(0, 0.1, clip.video.shape)
    assert flicker(clip.video + noise, clip.identity) > 5


def test_hair_that_nobody_has_is_no_error(clip) -> None:
    person, look = jax.jit(lambda i: draw_identity(i, "heldout")), jax.jit(lambda i, m: render(i, m, 128))
    bald = next(
        dataclasses.replace(clip, identity=someone)
        for someone in map(person, range(20))
        if "hair" not in colour_error(clip.video, someone)
    )
    video = np.broadcast_to(np.asarray(look(bald.identity, neutral_motion(1))), clip.video.shape)
    numbers = colour_numbers([video], [bald])
    assert np.isnan(numbers["colour_hair"])
    assert numbers["colour"] <= numbers["colour_worst"] < 1.5
