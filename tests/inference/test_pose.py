"""Poses become latents block by block, in step with the frames that are shown."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.inference import pose
from lavatar_jax.inference.pose import PoseEncoder
from tests.tiny import random_vae, tiny_vae_config

VAE = random_vae(tiny_vae_config())
FACTOR = VAE.config.temporal_factor
SIZE = 2 * VAE.config.spatial_factor


def poses(frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (frames, SIZE, SIZE, 3)).astype(np.uint8)


def encoded(frames: np.ndarray, blocks: int, **options) -> list[np.ndarray]:
    encoder = PoseEncoder(VAE, [frames[:5], frames[5:]], 2, height=SIZE, width=SIZE, **options)
    return [np.asarray(latent) for latent in itertools.islice(encoder, blocks)]


@pytest.mark.parametrize("block_frames", [1, 3])
def test_every_clip_is_encoded_by_itself_behind_its_first_frame(block_frames: int) -> None:
    span = block_frames * FACTOR
    frames = poses(4 * span)
    got = encoded(frames, 4, block_frames=block_frames)
    for clip in range(2):
        own = frames[2 * clip * span : (2 * clip + 2) * span]
        video = jnp.asarray(np.concatenate([own[:1], own]), jnp.float32)[None] / 127.5 - 1.0
        want = np.asarray(jax.jit(VAE.encode)(video))[:, 1:]
        np.testing.assert_allclose(np.concatenate(got[2 * clip : 2 * clip + 2], 1), want, atol=1e-5)


def test_the_first_frame_leads_and_the_last_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that drops 3 frames shows pose j in frame j, as it lets sound j be heard there."""
    seen: list[np.ndarray] = []

    def look(vae, video, cache, *, first: bool):
        if not first:
            seen.append(np.asarray(video)[0, :, 0, 0, 0])
        return video, cache

    monkeypatch.setattr(pose, "encode_chunk", look)
    frames = poses(7)
    encoded(frames, 2, block_frames=2, lead=3)
    numbers = [0, 0, 0, *range(7), *[6] * (4 * FACTOR - 10)]
    np.testing.assert_allclose(np.concatenate(seen), frames[numbers, 0, 0, 0] / 127.5 - 1.0, atol=1e-6)
