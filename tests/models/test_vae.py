"""The video VAEs: against the reference, streams against whole clips, and what training relies on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lavatar_jax.config import VAEConfig
from lavatar_jax.errors import UserError
from lavatar_jax.models.vae import CausalVAE, make_vae, to_pixels, wan22_config
from lavatar_jax.models.vae.autoencoder import patchify, unpatchify
from lavatar_jax.models.vae.blocks import ChannelRMSNorm
from lavatar_jax.models.vae.wan22 import average_down, duplicate_up
from tests.shared import shared_path
from tools.parity import vae as parity

encode = jax.jit(CausalVAE.encode)
decode = jax.jit(CausalVAE.decode)
stream_encode = jax.jit(CausalVAE.stream_encode, static_argnames="first")
stream_decode = jax.jit(CausalVAE.stream_decode, static_argnames="first")


def small_config(**changes) -> VAEConfig:
    config = VAEConfig(
        kind="wan22",
        width=4,
        multipliers=(1, 2),
        res_blocks=1,
        temporal_downsample=(True,),
        latent_channels=3,
        latent_mean=(0.5, -1.0, 0.0),
        latent_std=(2.0, 0.5, 1.0),
    )
    return dataclasses.replace(config, **changes)


def random_vae(config: VAEConfig, seed: int = 0) -> CausalVAE:
    """Random numbers in every parameter, norms and biases included (and no compilation)."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        fan_in = np.prod(leaf.shape[:-1], initial=1)
        return jnp.asarray(
            rng.normal(size=leaf.shape, loc=leaf.ndim == 1, scale=0.5) / np.sqrt(fan_in), jnp.float32
        )

    return jax.tree.map(fill, jax.eval_shape(lambda: make_vae(config, rngs=nnx.Rngs(0))))


@st.composite
def configs(draw) -> VAEConfig:
    temporal = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=2)))
    return small_config(
        kind=draw(st.sampled_from(["wan21", "wan22"])),
        decoder_width=draw(st.sampled_from([None, 6])),
        multipliers=draw(st.sampled_from([(1, 2, 4), (1, 1, 2), (1, 2, 2)]))[: len(temporal) + 1],
        temporal_downsample=temporal,
        patch=draw(st.sampled_from([1, 2])),
    )


# The reference


@pytest.fixture(scope="module")
def golden() -> dict[str, tuple]:
    return {name: rest for name, *rest in parity.check(shared_path("golden/09_wan21_vae"))}


@pytest.mark.parametrize(
    "name",
    [
        "enc_video",
        "enc_first_frame",
        "enc_frame_x5",
        "stream_enc",
        "dec_full",
        "dec_clamped_absmax",
        "stream_block1",
        "stream_block2",
    ],
)
def test_agrees_with_the_reference(golden, name) -> None:
    got, want, rtol, atol = golden[name]
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


# Streams


@settings(max_examples=3)
@given(config=configs(), seed=st.integers(0, 2**16))
def test_streams_equal_whole_clips(config, seed) -> None:
    vae = random_vae(config, seed)
    time, space = config.temporal_factor, config.spatial_factor
    height, width = 2 * space, 3 * space
    video = jax.random.uniform(jax.random.key(seed), (2, 1 + 5 * time, height, width, 3), minval=-1)

    latent = encode(vae, video)
    assert latent.shape == (2, 6, 2, 3, config.latent_channels)
    cache = vae.init_encode_cache(2, height, width)
    latents = []
    for begin, end in [(0, 1 + time), (1 + time, 1 + 3 * time), (1 + 3 * time, 1 + 5 * time)]:
        chunk, cache = stream_encode(vae, video[:, begin:end], cache, first=begin == 0)
        latents.append(chunk)
    np.testing.assert_allclose(jnp.concatenate(latents, axis=1), latent, rtol=1e-4, atol=1e-4)

    decoded = decode(vae, latent)
    assert decoded.shape == video.shape
    cache = vae.init_decode_cache(2, 2, 3)
    frames = []
    for begin, end in [(0, 2), (2, 4), (4, 6)]:
        chunk, cache = stream_decode(vae, latent[:, begin:end], cache, first=begin == 0)
        frames.append(chunk)
    np.testing.assert_allclose(jnp.concatenate(frames, axis=1), decoded, rtol=1e-4, atol=1e-4)


def shapes(tree) -> list:
    return jax.tree.leaves(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree))


@pytest.mark.parametrize("kind", ["wan21", "wan22"])
def test_caches_never_change_their_shapes(kind) -> None:
    vae = jax.eval_shape(lambda: make_vae(small_config(kind=kind), rngs=nnx.Rngs(0)))
    video, latent = jnp.zeros((1, 3, 4, 4, 3)), jnp.zeros((1, 2, 2, 2, 3))
    for step, chunk, new in [
        (CausalVAE.stream_encode, video, CausalVAE.init_encode_cache),
        (CausalVAE.stream_decode, latent, CausalVAE.init_decode_cache),
    ]:
        size = (4, 4) if step is CausalVAE.stream_encode else (2, 2)
        start = jax.eval_shape(lambda vae, new=new, size=size: new(vae, 1, *size), vae)
        first = jax.eval_shape(lambda *a, step=step: step(*a, first=True)[1], vae, chunk, start)
        later = jax.eval_shape(lambda *a, step=step: step(*a, first=False)[1], vae, chunk[:, :2], first)
        assert shapes(start)
        assert shapes(start) == shapes(first) == shapes(later)
        assert jax.tree.structure(start) == jax.tree.structure(first) == jax.tree.structure(later)


# The Wan 2.2 pieces, by the definition of their channel orders


def test_average_down_folds_colour_time_row_column() -> None:
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 6, 2)).astype(np.float32)
    got = average_down(jnp.asarray(x), 4, time=2, space=2)
    padded = np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)  # the first frame's cell starts with zeros
    want = np.zeros((1, 2, 2, 3, 4))
    for t, i, j, out in np.ndindex(2, 2, 3, 4):
        folded = [
            padded[0, 2 * t + dt, 2 * i + di, 2 * j + dj, c]
            for c in range(2)
            for dt in range(2)
            for di in range(2)
            for dj in range(2)
        ]
        want[0, t, i, j, out] = np.mean(folded[4 * out : 4 * out + 4])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_average_down_repeats_channels_where_there_are_too_few() -> None:
    x = jnp.arange(2.0).reshape(1, 1, 1, 1, 2)
    np.testing.assert_array_equal(average_down(x, 4, time=1, space=1).ravel(), [0, 0, 1, 1])


def test_duplicate_up_unfolds_colour_time_row_column() -> None:
    x = np.random.default_rng(0).normal(size=(1, 2, 2, 3, 4)).astype(np.float32)
    n_out = 2
    got = duplicate_up(jnp.asarray(x), n_out, time=2, space=2, first=False)
    duplicated = np.repeat(x, 4, axis=-1)
    want = np.zeros((1, 4, 4, 6, n_out), np.float32)
    for t, i, j, c in np.ndindex(4, 4, 6, n_out):
        channel = ((c * 2 + t % 2) * 2 + i % 2) * 2 + j % 2
        want[0, t, i, j, c] = duplicated[0, t // 2, i // 2, j // 2, channel]
    np.testing.assert_array_equal(got, want)
    first = duplicate_up(jnp.asarray(x), n_out, time=2, space=2, first=True)
    np.testing.assert_array_equal(first, want[:, 1:])


def test_patches_are_ordered_colour_column_row() -> None:
    video = np.arange(4 * 4 * 3, dtype=np.float32).reshape(1, 1, 4, 4, 3)
    x = patchify(jnp.asarray(video), 2)
    for colour, column, row in np.ndindex(3, 2, 2):
        np.testing.assert_array_equal(
            x[0, 0, 1, 0, (colour * 2 + column) * 2 + row], video[0, 0, 2 + row, column, colour]
        )
    np.testing.assert_array_equal(unpatchify(x, 2), video)


def test_published_wan22_factors_and_sizes() -> None:
    config = wan22_config()
    assert (config.spatial_factor, config.temporal_factor) == (16, 4)
    vae = jax.eval_shape(lambda: make_vae(config, rngs=nnx.Rngs(0)))
    assert vae.encoder.conv_in.weight.shape == (3, 3, 3, 12, 160)
    assert vae.decoder.layers[1].layers[3].time_conv.weight.shape == (3, 1, 1, 1024, 2048)
    assert vae.decoder.layers[2].layers[3].time_conv is None
    assert vae.decoder.head.conv.weight.shape == (3, 3, 3, 256, 12)


# What training and users rely on


@pytest.mark.parametrize("kind", ["wan21", "wan22"])
def test_a_fresh_model_has_sane_outputs_and_gradients(kind) -> None:
    vae = jax.jit(lambda: make_vae(small_config(kind=kind, width=8), rngs=nnx.Rngs(0)))()

    def loss(vae, video):
        mean, logvar = vae.encode_distribution(video)
        output = vae.decode(vae.normalise(mean))
        return jnp.mean(jnp.abs(output - video)), (jnp.std(output), jnp.std(mean), jnp.std(logvar))

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    video = jax.random.uniform(jax.random.key(0), (1, 3, 8, 8, 3), minval=-1)
    (_, spreads), gradient = value_and_grad(vae, video)
    assert all(0.05 < spread < 5 for spread in spreads)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient.decoder.head))
    for clip in (video, jnp.full_like(video, 0.1)):  # a flat clip has no detail to normalise by
        _, gradient = value_and_grad(vae, clip)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 100


def test_normalisation_and_its_inverse() -> None:
    vae = random_vae(small_config())
    raw = jnp.asarray([2.5, -1.5, 3.0])
    np.testing.assert_allclose(vae.normalise(raw), [1.0, -1.0, 3.0])
    np.testing.assert_allclose(vae.denormalise(vae.normalise(raw)), raw)
    video = jax.random.uniform(jax.random.key(0), (1, 3, 4, 4, 3))
    mean, _ = jax.jit(CausalVAE.encode_distribution)(vae, video)
    np.testing.assert_allclose(encode(vae, video), vae.normalise(mean), rtol=1e-5, atol=1e-6)


def test_computes_in_the_dtype_of_the_parameters() -> None:
    vae = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_vae(small_config()))
    latent = jax.eval_shape(CausalVAE.encode, vae, jnp.zeros((1, 3, 4, 4, 3)))
    cache = vae.init_decode_cache(1, 2, 2)
    video, cache = jax.eval_shape(lambda *a: CausalVAE.stream_decode(*a, first=True), vae, latent, cache)
    assert {leaf.dtype for leaf in [latent, video, *jax.tree.leaves(cache)]} == {jnp.dtype(jnp.bfloat16)}


def test_norm_is_the_normalised_vector() -> None:
    x = np.random.default_rng(0).normal(size=(1, 1, 1, 1, 6)).astype(np.float32)
    want = x / np.linalg.norm(x) * np.sqrt(6)
    np.testing.assert_allclose(ChannelRMSNorm(6)(jnp.asarray(x)), want, rtol=1e-6)


def test_to_pixels_clamps() -> None:
    np.testing.assert_array_equal(to_pixels(jnp.asarray([-3.0, 0.5, 2.0])), [-1.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("frames", "height", "first", "words"),
    [(4, 4, True, "1 . 2k"), (3, 4, False, "of 2k"), (3, 5, True, "divide")],
)
def test_videos_of_the_wrong_size_are_refused(frames, height, first, words) -> None:
    vae = random_vae(small_config())
    with pytest.raises(UserError, match=words):
        vae.stream_encode(jnp.zeros((1, frames, height, 4, 3)), None, first=first)


@pytest.mark.parametrize("changes", [{"latent_mean": (0.0,)}, {"temporal_downsample": (True, True)}])
def test_inconsistent_configurations_are_refused(changes) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        make_vae(small_config(**changes), rngs=nnx.Rngs(0))
