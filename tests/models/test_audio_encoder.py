"""The causal audio encoder: what it sees of the past, and what it must not see of the future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.models.audio_encoder import AudioTokens, encode_audio
from tests.tiny import normal, random_dit, tiny_config

CONFIG = tiny_config(audio_layers=3)
encode = jax.jit(encode_audio, static_argnames="block_frames")


@pytest.fixture(scope="module")
def encoder():
    return random_dit(CONFIG).audio_encoder


def features(frames: int, seed: int = 0, batch: int = 1, speakers: int = 1) -> jax.Array:
    return normal(seed, batch, speakers, CONFIG.audio_layers, CONFIG.audio_dim, frames)


def assert_close(got: AudioTokens, want: AudioTokens) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_five_copies_in_front_are_as_good_as_73(encoder) -> None:
    """The reference repeats the first frame 73 times and drops 19 latent frames of the result."""
    x = features(24)
    long = jnp.concatenate([jnp.repeat(x[..., :1], 73, axis=-1), x], axis=-1)
    whole = encoder(long[:, 0])
    assert whole.local.shape[2] == 25
    assert_close(encode(encoder, x), AudioTokens(*(tokens[:, :, 19:] for tokens in whole)))


def test_blockwise_encodes_every_block_as_if_it_were_the_first(encoder) -> None:
    x = features(36, batch=2, speakers=2)
    blocks = [encode(encoder, x[..., start : start + 12]) for start in (0, 12, 24)]
    want = AudioTokens(*(jnp.concatenate(parts, axis=2) for parts in zip(*blocks, strict=True)))
    got = encode(encoder, x, block_frames=3)
    assert got.local.shape == (2, 2, 9, CONFIG.audio_tokens + 1, CONFIG.width)
    assert got.global_.shape == (2, 2, 9, CONFIG.width)
    assert_close(got, want)
    assert np.abs(np.asarray(got.local - encode(encoder, x).local))[:, :, 3:].max() > 1e-2


def test_it_hears_the_past_only(encoder) -> None:
    x, later = features(24), features(24, seed=1)
    changed = jnp.concatenate([x[..., :12], later[..., 12:]], axis=-1)
    got, want = encode(encoder, changed), encode(encoder, x)
    assert_close(*(AudioTokens(*(y[:, :, :3] for y in tokens)) for tokens in (got, want)))
    for a, b in zip(got, want, strict=True):
        assert np.abs(np.asarray(a - b))[:, :, 3].max() > 1e-2


def test_every_video_frame_of_a_latent_frame_is_heard(encoder) -> None:
    x = features(12)
    for frame in range(12):
        changed = encode(encoder, x.at[..., frame].add(1.0))
        moved = np.abs(np.asarray(changed.global_ - encode(encoder, x).global_)).max(axis=(0, 1, 3))
        assert moved[frame // 4] > 1e-3


def test_speakers_do_not_hear_each_other(encoder) -> None:
    x = features(12, batch=2, speakers=2)
    alone = encode(encoder, x[1:, 1:])
    assert_close(AudioTokens(*(y[1:, 1:] for y in encode(encoder, x))), alone)


def test_the_last_token_is_learned_and_the_layers_are_mixed(encoder) -> None:
    x = features(12)
    tokens = encode(encoder, x)
    np.testing.assert_array_equal(tokens.local[0, 0, :, -1], jnp.tile(encoder.padding_token[...], (3, 1)))
    weights = jax.nn.silu(encoder.layer_weights[...])
    mixed = jnp.einsum("BPLAT,L->BPAT", x, weights / weights.sum())
    same = jnp.repeat(mixed[:, :, None], CONFIG.audio_layers, axis=2)
    assert_close(encode(encoder, same), tokens)


def test_half_precision_weights_are_computed_with_in_float32(encoder) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), encoder)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    assert isinstance(half, nnx.Module)
    for got, want in zip(encode(half, features(12)), encode(rounded, features(12)), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("frames", "block_frames", "message"),
    [(10, None, "whole latent frames"), (32, 3, "8 latent frames are not a whole number of blocks of 3")],
)
def test_part_frames_and_part_blocks_are_refused(encoder, frames, block_frames, message) -> None:
    with pytest.raises(ValueError, match=message):
        encode_audio(encoder, features(frames), block_frames=block_frames)
