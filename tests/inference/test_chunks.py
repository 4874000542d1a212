"""Clips pass through the VAE a few frames at a time: the numbers of whole clips, in the memory of a chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.config import RELEASE_SINGLE, RELEASE_TPP, SamplingConfig
from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.flops import _inner_programs
from lavatar_jax.inference import encode as encoding
from lavatar_jax.inference.conditions import image_conditions
from lavatar_jax.inference.decode import ClipDecoder, StreamDecoder
from lavatar_jax.inference.encode import chunks, encode
from lavatar_jax.models.vae import CausalVAE, to_pixels
from tests.tiny import normal, random_vae, tiny_config, tiny_vae_config
from tools import real_encode

VAE = random_vae(tiny_vae_config())
HEIGHT, WIDTH = 8, 12  # 2 x 3 latents
encode_whole = jax.jit(CausalVAE.encode)
decode_whole = jax.jit(lambda vae, latent: to_pixels(vae.decode(latent)))


def clip(frames: int) -> jax.Array:
    return jnp.tanh(normal(frames, 1, frames, HEIGHT, WIDTH, 3))


def latents(count: int, seed: int = 0) -> jax.Array:
    return normal(seed, 1, count, 2, 3, 3)


# The numbers of whole clips


@pytest.mark.parametrize("count", range(1, 12))
def test_pieces_follow_each_other_and_only_the_first_is_not_full(count: int) -> None:
    first, *rest = [range(count)[piece] for piece in chunks(count, 3)]
    assert [*first, *(i for piece in rest for i in piece)] == [*range(count)]
    assert 1 <= len(first) <= 3
    assert all(len(piece) == 3 for piece in rest)


@pytest.fixture(scope="module")
def long_clip() -> tuple[jax.Array, jax.Array]:
    """41 frames and their latents; nothing looks ahead, so the shorter clips are its beginnings."""
    video = clip(41)
    return video, encode_whole(VAE, video)


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17, 25, 41])
def test_clips_of_all_lengths_are_encoded_as_whole(long_clip, frames: int) -> None:
    video, want = long_clip
    got = encode(VAE, video[:, :frames])
    assert got.shape[1] == 1 + (frames - 1) // 4
    np.testing.assert_allclose(got, want[:, : got.shape[1]], atol=1e-5)


@pytest.mark.parametrize(("frames", "height"), [(0, 8), (4, 8), (16, 8), (13, 6)])
def test_clips_that_do_not_fit_are_refused(frames: int, height: int) -> None:
    with pytest.raises(UserError):
        encode(VAE, np.zeros((1, frames, height, WIDTH, 3), np.float32))


@pytest.mark.parametrize("primed", [2, 7])
def test_the_stream_goes_on_after_any_number_of_still_latents(primed: int) -> None:
    decoder = StreamDecoder(VAE, latents(primed), 3)
    blocks = latents(6, seed=1)
    got = jnp.concatenate([decoder(blocks[:, :3]), decoder(blocks[:, 3:])], axis=1)
    want = decode_whole(VAE, jnp.concatenate([latents(primed), blocks], axis=1))[:, -21:]
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("motion_latents", "clip_latents"), [(6, 4), (1, 1)])
def test_clips_are_decoded_as_whole_behind_their_motion(motion_latents: int, clip_latents: int) -> None:
    history = clip(1 + 4 * (motion_latents - 1))
    motion = encode_whole(VAE, history)
    decoder = ClipDecoder(VAE, history, motion, overlap=5, drop_first=3)
    for number, dropped in enumerate([3, 0]):  # the second follows the pixels of the first
        own = latents(clip_latents, seed=number)
        got = decoder(own)
        want = decode_whole(VAE, jnp.concatenate([motion, own], axis=1))[:, -4 * clip_latents :][:, dropped:]
        np.testing.assert_allclose(got, want, atol=1e-5)
        history = jnp.concatenate([history, want[:, -5:]], axis=1)[:, -history.shape[1] :]
        motion = encode_whole(VAE, history)
        np.testing.assert_allclose(decoder.motion, motion, atol=1e-4)


def test_training_records_are_encoded_as_whole_clips() -> None:
    video = np.random.default_rng(0).integers(0, 256, (21, HEIGHT, WIDTH, 3), np.uint8)
    got, spread = real_encode._encode(VAE, video)
    mean, log_variance = jax.jit(CausalVAE.encode_distribution)(VAE, video[None] / np.float32(127.5) - 1)
    np.testing.assert_allclose(got, mean[0], atol=1e-5)
    np.testing.assert_allclose(spread, np.exp(0.5 * log_variance).mean(axis=(0, 1, 2, 3)), rtol=1e-4)


# The memory of a chunk


def largest_activation(function, *args) -> int:
    """Numbers in the largest result of a convolution, of all that is computed; nothing is."""

    def largest(program) -> int:
        sizes = [0]
        for equation in program.eqns:
            if equation.primitive.name == "conv_general_dilated":
                sizes.append(equation.outvars[0].aval.size)
            sizes += map(largest, _inner_programs(equation.params))
        return max(sizes)

    return largest(jax.make_jaxpr(function)(*args).jaxpr)


def decode_clip(history: jax.Array, motion: jax.Array, own: jax.Array) -> jax.Array:
    decoder = ClipDecoder(VAE, history, motion, overlap=9, drop_first=0)
    return decoder(own), decoder.motion


def test_the_largest_activation_does_not_grow_with_the_clip() -> None:
    whole = functools.partial(largest_activation, VAE.encode)
    assert whole(clip(97)) > 3 * whole(clip(25))  # the measure itself
    sizes = {largest_activation(lambda video: encode(VAE, video), clip(n)) for n in (13, 25, 29, 97)}
    assert len(sizes) == 1
    decoded = {
        largest_activation(decode_clip, clip(4 * motion - 3), latents(motion), latents(own))
        for motion, own in [(4, 3), (25, 3), (4, 12), (92, 13)]
    }
    assert len(decoded) == 1
    primed = {
        largest_activation(lambda still: StreamDecoder(VAE, still, 0).state(), latents(n)) for n in (4, 7, 31)
    }
    assert len(primed) == 1


def test_training_records_are_encoded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(vae, video, cache, *, first: bool):
        seen.append((len(video), first))
        return jnp.zeros((1, 2, 3, 3)), jnp.zeros((1, 3)), ()

    monkeypatch.setattr(real_encode, "_encode_chunk", look)
    real_encode._encode(VAE, np.zeros((33, HEIGHT, WIDTH, 3), np.uint8))
    assert seen == [(9, True), (12, False), (12, False)]


@pytest.mark.parametrize(
    ("sampling", "reference", "motion"),
    [
        (RELEASE_TPP, 1, [(1, True), *[(12, False)] * 6]),
        (RELEASE_SINGLE, 5, [(5, True), *[(12, False)] * 30]),
        (SamplingConfig(motion=False, prime_latents=1), 1, []),
    ],
)
def test_a_photo_takes_few_programs(sampling, reference, motion, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the photo alone, and where motion frames follow two: how they begin, and how they go on."""
    alone, seen = [], []
    run_alone, run_chunk = encoding._encode_alone, encoding.encode_chunk

    def look_alone(vae, video):
        alone.append(video.shape[1])
        return run_alone(vae, video)

    def look(vae, video, cache, *, first: bool):
        seen.append((video.shape[1], first))
        return run_chunk(vae, video, cache, first=first)

    monkeypatch.setattr(encoding, "_encode_alone", look_alone)
    monkeypatch.setattr(encoding, "encode_chunk", look)
    photo, dit = np.zeros((HEIGHT, WIDTH, 3), np.uint8), tiny_config(use_motion=True)
    jax.eval_shape(lambda: image_conditions(dit, VAE, sampling, photo, jnp.zeros((1, 4, 6))))
    assert set(alone) == {reference}
    assert seen == motion
