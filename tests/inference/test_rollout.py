"""The sequential rollout: every switch, every random number, one trace, and no end."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavatar_jax.config import SAMPLING_PRESETS, SamplingConfig
from lavatar_jax.diffusion import add_noise
from lavatar_jax.inference import denoise
from lavatar_jax.inference.conditions import image_conditions
from lavatar_jax.inference.denoise import (
    denoise_block,
    fill_sink,
    forwards_per_block,
    init_rings,
    plan_block,
    ring_count,
    start_session,
)
from lavatar_jax.inference.rollout import Block, Draws, rollout
from lavatar_jax.models.attention import init_cache
from lavatar_jax.models.audio_encoder import encode_audio
from lavatar_jax.models.dit import timestep_sinusoid
from lavatar_jax.models.dit_forward import prefill_sink, stream_forward
from lavatar_jax.types import BlockInput
from tests.tiny import normal, random_dit, random_vae, tiny_config, tiny_vae_config

DIT = random_dit(tiny_config(use_motion=True))
VAE = random_vae(tiny_vae_config())
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
TEXT = normal(3, 1, 4, 6)
LATENT = (1, 3, 8, 8, 3)

# Two steps compile quickly; the sink adapts and rolls from block 1 on.
BASE = SamplingConfig(
    steps=2, ring_blocks=2, adapt_sink_after=1, sink_distance=30, motion_copies=13, prime_latents=2
)
CLIPS = dataclasses.replace(BASE, decode="clip", clip_blocks=2)
FIXED_NOISE = dataclasses.replace(BASE, history="fixed_noise")


def sound() -> Iterator[BlockInput]:
    return (BlockInput(normal(100 + block, 1, 1, 2, 5, 12)) for block in itertools.count())


def conditions_for(sampling: SamplingConfig):
    return image_conditions(DIT.config, VAE, sampling, IMAGE, TEXT)


def run(sampling: SamplingConfig, blocks: int, **options) -> list[Block]:
    source = itertools.islice(sound(), blocks)
    steps = rollout(DIT, VAE, conditions_for(sampling), source, sampling, **options)
    # The rings live until the next block only; they are not part of the result.
    return [dataclasses.replace(block, rings=()) for block in steps]


@functools.cache
def video(sampling: SamplingConfig, blocks: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(latents, frames) of a rollout."""
    results = run(sampling, blocks, seed=seed)
    latents = {block.index: np.asarray(block.latent) for block in results}
    frames = [np.asarray(block.frames) for block in results if block.frames is not None]
    return np.concatenate(list(latents.values()), axis=1), np.concatenate(frames, axis=1)


# Switches

# field -> (settings that must change the result, what they are compared with)
SWITCHES: dict[str, tuple[list, SamplingConfig]] = {
    "steps": ([1, 3, 8], BASE),
    "shift": ([5.0], BASE),
    "doubly_shifted": ([False], BASE),
    "ring_blocks": ([3], BASE),
    "sink": ([False], BASE),
    "motion": ([False], BASE),
    "adapt_sink_after": ([None, 4], BASE),
    "adapt_motion": ([True], dataclasses.replace(CLIPS, adapt_sink_after=2)),
    "rolling_rope": ([False], BASE),
    "sink_distance": ([12, (4, 30)], BASE),
    "half_rope_table": ([True], BASE),
    "history": (["clean", "fixed_noise"], BASE),
    "history_sigma": ([0.3], FIXED_NOISE),
    "reference_copies": ([5], BASE),
    "motion_copies": ([29], BASE),
}
DECODING_SWITCHES: dict[str, tuple[list, SamplingConfig]] = {
    "decode": (["clip"], BASE),
    "clip_blocks": ([3], CLIPS),
    "prime_latents": ([1], BASE),
    "drop_first_frames": ([0], BASE),
}


def pairs(switches: dict[str, tuple[list, SamplingConfig]]):
    return [
        pytest.param(dataclasses.replace(base, **{name: value}), base, id=f"{name}={value}")
        for name, (values, base) in switches.items()
        for value in values
    ]


def test_every_switch_is_tested_here() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingConfig)}
    assert fields == SWITCHES.keys() | DECODING_SWITCHES.keys()


@pytest.mark.parametrize(("changed", "base"), pairs(SWITCHES))
def test_switches_of_the_denoiser_change_the_latents(changed: SamplingConfig, base: SamplingConfig) -> None:
    latents, frames = video(changed)
    assert np.isfinite(latents).all()
    assert np.isfinite(frames).all()
    assert latents.shape == (1, 15, 8, 8, 3)
    assert frames.shape == (1, 57, 32, 32, 3)  # 12 a block, less the first 3
    assert np.abs(latents - video(base)[0]).max() > 1e-5


@pytest.mark.parametrize(("changed", "base"), pairs(DECODING_SWITCHES))
def test_switches_of_the_decoder_change_frames_only(changed: SamplingConfig, base: SamplingConfig) -> None:
    (latents, frames), (base_latents, base_frames) = video(changed), video(base)
    np.testing.assert_array_equal(latents, base_latents)
    assert frames.shape[1] == 60 - changed.drop_first_frames
    if changed.drop_first_frames == 0:
        np.testing.assert_array_equal(frames[:, 3:], base_frames)
    else:
        assert np.abs(frames - base_frames).max() > 1e-5


@pytest.mark.parametrize("name", SAMPLING_PRESETS)
def test_presets_run(name: str) -> None:
    # Fewer copies of the photo, for speed: they are counted in test_conditions.
    sampling = dataclasses.replace(SAMPLING_PRESETS[name], motion_copies=13, prime_latents=2)
    latents, frames = video(sampling, 2)
    assert latents.shape == (1, 6, 8, 8, 3)
    assert frames.shape == (1, 21, 32, 32, 3)
    assert np.isfinite(frames).all()
    assert np.abs(frames).max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"ring_blocks": 0}, "ring_blocks must be at least 1"),
        ({"adapt_sink_after": 0}, "adapt_sink_after must be at least 1"),
        ({"adapt_motion": True}, "needs decode='clip'"),
    ],
)
def test_senseless_settings_are_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


def test_clips_cannot_be_decoded_without_their_history() -> None:
    steps = rollout(DIT, VAE, conditions_for(BASE), sound(), CLIPS)
    with pytest.raises(ValueError, match="history frames"):
        next(steps)


# The sink


@pytest.mark.parametrize("after", [1, 4])
def test_the_sink_adapts_once_to_the_first_latent(after: int) -> None:
    sinks: list = []
    sampling = dataclasses.replace(BASE, adapt_sink_after=after)
    blocks = run(sampling, 6, on_sink=lambda *sink: sinks.append(sink))
    (photo, motion), (adapted, same_motion) = sinks
    np.testing.assert_array_equal(photo, conditions_for(sampling).reference)
    np.testing.assert_array_equal(adapted, blocks[0].latent[:, :1])
    assert motion is same_motion
    never = run(dataclasses.replace(sampling, adapt_sink_after=None), 6)
    same = [bool(jnp.array_equal(a.latent, b.latent)) for a, b in zip(blocks, never, strict=True)]
    assert same == [True] * after + [False] * (6 - after)


def test_the_sink_adapts_with_the_motion_of_the_first_clip() -> None:
    sinks: list = []
    sampling = dataclasses.replace(CLIPS, adapt_sink_after=2, adapt_motion=True)
    run(sampling, 3, on_sink=lambda *sink: sinks.append(sink))
    (_, motion), (_, adapted) = sinks
    assert motion.shape == adapted.shape
    assert np.abs(np.asarray(motion - adapted)).max() > 1e-3


@pytest.mark.parametrize("change", [{"sink": False}, {"adapt_sink_after": None}])
def test_without_adaptation_the_sink_is_set_at_most_once(change) -> None:
    sinks: list = []
    run(dataclasses.replace(BASE, **change), 3, on_sink=lambda *sink: sinks.append(sink))
    assert len(sinks) == ("sink" not in change)


# History


def test_noisy_history_has_a_ring_per_step_and_no_extra_forward(monkeypatch) -> None:
    """Number of function evaluations per block, counted in the traced program."""
    calls: list = []
    monkeypatch.setattr(denoise, "stream_forward", lambda *a, **k: calls.append(1) or stream_forward(*a, **k))
    for history, extra in (("noisy", 0), ("clean", 1), ("fixed_noise", 1)):
        sampling = dataclasses.replace(BASE, steps=3, history=history)
        calls.clear()
        session, rings, plan = start(sampling)
        noise = normal(0, *LATENT)
        extra_noise = noise if history == "fixed_noise" else None
        arguments = (DIT, rings, noise, next(sound()), plan, session, extra_noise)
        jax.eval_shape(lambda *arguments: denoise_block.__wrapped__(*arguments), *arguments)
        assert len(calls) == forwards_per_block(sampling) == 3 + extra
        assert len(rings) == ring_count(sampling) == (1 if extra else 3)
        assert len(plan.sink_ropes) == len(calls)


def start(sampling: SamplingConfig, block: int = 0, distance: int = 5):
    """(session, rings, plan of a block) of a rollout by hand."""
    conditions = conditions_for(sampling)
    session = start_session(DIT, TEXT, None, sampling=sampling)
    rings = init_rings(DIT.config, sampling, 1, 8, 8, jnp.float32)
    rings = fill_sink(DIT, rings, conditions.reference, conditions.motion, session.text, half_table=False)
    plan = plan_block(DIT.config, sampling, block, 8, 8, [distance] * forwards_per_block(sampling))
    return session, rings, plan


@pytest.mark.parametrize("history", ["clean", "fixed_noise"])
def test_the_extra_forward_remembers_the_finished_block(history: str) -> None:
    """The ring ends with the keys of the clean (or slightly noised) result, told so by its timestep."""
    sampling = dataclasses.replace(BASE, history=history)
    session, rings, plan = start(sampling)
    noise = normal(9, *LATENT) if history == "fixed_noise" else None
    inputs = next(sound())
    latent, _, (ring,) = denoise_block(DIT, rings, normal(0, *LATENT), inputs, plan, session, noise)

    sigma = 0.0 if noise is None else sampling.history_sigma
    remembered = latent if noise is None else add_noise(latent, noise, sigma)
    sinusoid = timestep_sinusoid(np.full((1, 3), 1000 * sigma), DIT.config.freq_dim)
    _, (fresh,), _ = start(sampling)

    @jax.jit
    def remember(cache, latent):
        times, audio = DIT.embed_time(jnp.asarray(sinusoid)), encode_audio(DIT.audio_encoder, inputs.audio)
        arguments = (session.text, audio, plan.slot, plan.rope, plan.sink_ropes[-1])
        return stream_forward(DIT, cache, latent, times, *arguments)[1]

    want = remember(fresh, remembered)
    np.testing.assert_allclose(ring.k, want.k, atol=1e-5)
    np.testing.assert_allclose(ring.v, want.v, atol=1e-5)


def test_one_prefill_serves_every_ring() -> None:
    session, rings, _ = start(BASE)
    conditions = conditions_for(BASE)
    alone = init_cache(DIT.config, 1, rings[0].sink_tokens, rings[0].ring_tokens)
    alone = prefill_sink(DIT, alone, conditions.reference, conditions.motion, session.text)
    for ring in rings:
        np.testing.assert_allclose(ring.sink_k, alone.sink_k, atol=1e-5)
        np.testing.assert_allclose(ring.v, alone.v, atol=1e-5)


# Random numbers


def test_the_same_seed_gives_the_same_bits() -> None:
    sampling = dataclasses.replace(FIXED_NOISE, sink_distance=(4, 30))
    once, again, other = (run(sampling, 3, seed=seed) for seed in (5, 5, 6))
    for a, b, c in zip(once, again, other, strict=True):
        np.testing.assert_array_equal(a.latent, b.latent)
        np.testing.assert_array_equal(a.frames, b.frames)
        assert np.abs(np.asarray(a.latent - c.latent)).max() > 0.1


@given(block=st.integers(0, 2**62), seed=st.integers(0, 2**31))
def test_draws_belong_to_the_absolute_block(block: int, seed: int) -> None:
    sampling = dataclasses.replace(FIXED_NOISE, sink_distance=(4, 30), steps=4)
    draws, again = Draws(sampling, (3,), seed), Draws(sampling, (3,), seed)
    again.noise(0)  # order does not matter
    noise, history = np.asarray(draws.noise(block)), np.asarray(draws.history_noise(block))
    np.testing.assert_array_equal(again.noise(block), noise)
    np.testing.assert_array_equal(again.history_noise(block), history)
    assert again.distances(block) == draws.distances(block)
    other_seed = Draws(sampling, (3,), seed + 1).noise(block)
    others = [draws.noise(block + 1), draws.noise(block + 2**32), history, other_seed]
    assert all(np.abs(np.asarray(other) - noise).max() > 1e-6 for other in others)


def test_distances_cover_their_range_and_differ_between_forwards() -> None:
    draws = Draws(dataclasses.replace(BASE, sink_distance=(4, 30), steps=4), LATENT, 0)
    rows = [draws.distances(block) for block in range(300)]
    assert {distance for row in rows for distance in row} == set(range(4, 31))
    assert {len(row) for row in rows} == {4}
    assert any(len(set(row)) > 1 for row in rows)
    fixed = Draws(dataclasses.replace(BASE, sink_distance=17), LATENT, 0)
    assert fixed.distances(2**40) == [17, 17]


def test_start_noise_is_standard_normal() -> None:
    noise = np.asarray(Draws(BASE, (1, 3, 64, 64, 3), 0).noise(7))
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03


# No end


def test_one_trace_serves_the_whole_video() -> None:
    """Nothing is compiled once the sink has adapted, and the block's program only once at all."""
    compiled: list[str] = []

    def listen(event: str, _: float, **__) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    # A ring length that no other test has, so that its first block does compile.
    sampling = dataclasses.replace(BASE, ring_blocks=5, adapt_sink_after=2, sink_distance=(4, 30))
    before = denoise_block._cache_size()
    steps = rollout(DIT, VAE, conditions_for(sampling), sound(), sampling)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        next(steps)
        assert compiled
        assert denoise_block._cache_size() == before + 1
        next(steps)
        compiled.clear()
        for _ in range(8):
            next(steps)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert denoise_block._cache_size() == before + 1


def test_blocks_are_taken_only_when_their_frames_are_wanted() -> None:
    """A live source must not be asked ahead of time."""
    taken: list[int] = []
    source = (taken.append(index) or inputs for index, inputs in enumerate(sound()))
    steps = rollout(DIT, VAE, conditions_for(BASE), source, BASE)
    assert taken == []
    for wanted in range(3):
        assert next(steps).index == wanted
        assert taken == list(range(wanted + 1))


def test_no_sound_no_video() -> None:
    assert run(BASE, 0) == []
    assert run(CLIPS, 0) == []


def denoise_from(first: int, count: int) -> np.ndarray:
    """Latents of blocks numbered from `first` on, with equal noise and sound, through an empty ring."""
    sampling = dataclasses.replace(BASE, motion=False)
    session, rings, latents = start_session(DIT, TEXT, None, sampling=sampling), None, []
    rings = init_rings(DIT.config, sampling, 1, 8, 8, jnp.float32)
    rings = fill_sink(DIT, rings, normal(5, 1, 1, 8, 8, 3), None, session.text, half_table=False)
    for index, inputs in enumerate(itertools.islice(sound(), count)):
        plan = plan_block(DIT.config, sampling, first + index, 8, 8, [17, 17])
        latent, _, rings = denoise_block(DIT, rings, normal(index, *LATENT), inputs, plan, session)
        latents.append(np.asarray(latent))
    return np.concatenate(latents, axis=1)


def test_the_millionth_year_is_like_the_first_hour() -> None:
    """Rolling positions are relative, so blocks far apart but equal modulo the ring do the same.

    Angles are float64: after 2^33 blocks (130 years) they are exact to 1e-5, after 2^40 to 1e-3.
    """
    early = denoise_from(1000, 3)
    np.testing.assert_allclose(denoise_from(2**33, 3), early, atol=1e-4)
    np.testing.assert_allclose(denoise_from(2**40, 3), early, atol=1e-2)
    assert np.abs(denoise_from(0, 3) - early).max() > 1e-3  # the young ring is shorter, the sink nearer


# Clips


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_the_end_of_the_sound_may_cut_a_clip_short(blocks: int) -> None:
    results = run(CLIPS, blocks)
    lengths = [None if block.frames is None else block.frames.shape[1] for block in results]
    assert lengths == {1: [None, 9], 2: [None, 21], 3: [None, 21, None, 12], 4: [None, 21, None, 24]}[blocks]
    # A block left over is yielded once more, with the frames.
    assert [block.index for block in results] == [0, *range(1, blocks), *[blocks - 1] * (blocks % 2)]
    frames = [np.asarray(block.frames) for block in results if block.frames is not None]
    whole = video(CLIPS, 4)[1]
    np.testing.assert_allclose(np.concatenate(frames, axis=1), whole[:, : 12 * blocks - 3], atol=1e-5)


def test_velocities_lead_from_noise_to_the_latent() -> None:
    (block,) = run(BASE, 1)
    sigmas = denoise.schedule(BASE).sigmas
    x = Draws(BASE, LATENT, 0).noise(0)
    for velocity, sigma, after in zip(block.velocities, sigmas, sigmas[1:], strict=False):
        x = x + (after - sigma) * velocity
    np.testing.assert_allclose(x, block.latent, atol=1e-5)
    assert len(block.velocities) == BASE.steps
