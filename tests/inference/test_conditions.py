"""From a photo to the latents that a video starts from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.config import RELEASE_SINGLE, RELEASE_TPP, SamplingConfig
from lavatar_jax.inference.conditions import image_conditions, to_signed
from tests.tiny import normal, random_vae, tiny_config, tiny_vae_config

DIT = tiny_config(use_motion=True)
VAE = random_vae(tiny_vae_config())
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
TEXT = normal(3, 1, 4, 6)
SMALL = SamplingConfig(motion_copies=13, prime_latents=3)

encode = jax.jit(lambda vae, video: vae.encode(video))


def still(copies: int) -> jax.Array:
    return jnp.repeat(jnp.asarray(to_signed(IMAGE))[None, None], copies, axis=1)


def conditions(sampling: SamplingConfig, dit=DIT, **options):
    return image_conditions(dit, VAE, sampling, IMAGE, TEXT, **options)


def test_bytes_become_minus_one_to_one() -> None:
    signed = to_signed(np.array([0, 51, 255], np.uint8))
    assert signed.dtype == np.float32
    np.testing.assert_allclose(signed, [-1, -0.6, 1], atol=1e-6)


def test_a_photo_becomes_reference_motion_and_start() -> None:
    got = conditions(SMALL)
    assert got.text is TEXT
    assert got.actor_mask is None
    assert got.history is None
    assert got.reference.shape == (1, 1, 4, 6, 3)
    np.testing.assert_allclose(got.reference, encode(VAE, still(1)), atol=1e-5)
    np.testing.assert_allclose(got.motion, encode(VAE, still(13)), atol=1e-5)
    np.testing.assert_array_equal(got.still, got.motion[:, :3])


def test_the_single_gpu_release_takes_the_second_latent_of_five_copies() -> None:
    got = conditions(dataclasses.replace(SMALL, reference_copies=5))
    np.testing.assert_allclose(got.reference, encode(VAE, still(5))[:, 1:], atol=1e-5)
    assert np.abs(np.asarray(got.reference - conditions(SMALL).reference)).max() > 1e-3


@pytest.mark.parametrize(
    ("dit", "sampling"), [(DIT, dataclasses.replace(SMALL, motion=False)), (tiny_config(), SMALL)]
)
def test_without_motion_only_the_start_is_encoded(dit, sampling) -> None:
    """The decoder starts as before: nothing looks ahead, so fewer copies give the same first latents."""
    got = conditions(sampling, dit)
    assert got.motion is None
    assert got.still.shape == (1, 3, 4, 6, 3)
    np.testing.assert_allclose(got.still, conditions(SMALL).still, atol=1e-5)


def test_clips_keep_the_pixels_before_the_video() -> None:
    got = conditions(dataclasses.replace(SMALL, decode="clip", motion=False))
    np.testing.assert_array_equal(got.history, still(13))
    np.testing.assert_allclose(got.motion, encode(VAE, still(13)), atol=1e-5)


def test_there_are_enough_copies_to_start_the_decoder() -> None:
    got = conditions(dataclasses.replace(SMALL, motion_copies=1))
    assert got.still.shape[1] == 3


def test_actor_masks_are_passed_on() -> None:
    mask = jnp.ones((1, 2, 3, 2, 3))
    assert conditions(SMALL, actor_mask_1PFHW=mask).actor_mask is mask


@pytest.mark.parametrize(
    ("sampling", "frames", "latents"), [(RELEASE_TPP, 73, 19), (RELEASE_SINGLE, 365, 92)]
)
def test_releases_encode_as_many_motion_frames_as_documented(sampling, frames, latents) -> None:
    got = jax.eval_shape(lambda: conditions(sampling))
    assert sampling.motion_copies == frames
    assert got.motion.shape[1] == latents
    assert got.still.shape[1] == 7
