"""The transformer: ways to run the same weights that must agree, what may see what, and its full size."""

import dataclasses
import functools
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.config import DiTConfig
from lavatar_jax.errors import UserError
from lavatar_jax.models import rope as rp
from lavatar_jax.models.attention import init_cache, ring_slot
from lavatar_jax.models.audio_encoder import AudioTokens, encode_audio
from lavatar_jax.models.audio_injector import AudioInjector
from lavatar_jax.models.dit import CausalDiT, Head, Remat, timestep_sinusoid
from lavatar_jax.models.dit_forward import (
    block_causal_mask,
    cond_tokens,
    prefill_sink,
    stream_forward,
    teacher_forward,
    train_forward,
    train_rope,
)
from tests.shared import shared_path
from tests.tiny import normal, random_dit, tiny_config

CONFIG = tiny_config(layers=3, inject_layers=(0, 2))
FRAMES = 6  # two blocks of 3
LATENT, REFERENCE = normal(1, 1, FRAMES, 4, 4, 3), normal(2, 1, 1, 4, 4, 3)
TIMES = np.linspace(100, 900, FRAMES, dtype=np.float32)[None]
TEXT, AUDIO = normal(3, 1, 4, 6), normal(4, 1, 1, 2, 5, 4 * FRAMES)


@functools.partial(jax.jit, static_argnames=("blockwise_audio", "remat", "unroll"))
def train(model: CausalDiT, latent=LATENT, audio=AUDIO, t=TIMES, **options) -> jax.Array:
    return train_forward(model, latent, t, text_BSE=TEXT, audio=audio, ref_B1HWC=REFERENCE, **options)


@jax.jit
def teach(model: CausalDiT, latent=LATENT, audio=AUDIO) -> jax.Array:
    t = jnp.full(1, 500.0)
    return teacher_forward(model, latent, t, text_BSE=TEXT, audio_BPLAT=audio, ref_B1HWC=REFERENCE)


@functools.partial(jax.jit, static_argnames=("sink", "unroll"))
def stream(model: CausalDiT, *, sink: bool = True, unroll: bool = False) -> jax.Array:
    """Two blocks through a ring of one, with or without a sink."""
    config, tokens = model.config, 12
    text = model.text_keys_values(TEXT)
    cache = init_cache(config, 1, 4 if sink else 0, tokens, model.dtype)
    sink_rope = rp.zero_rope(0, config.head_dim)
    if sink:
        cache = prefill_sink(model, cache, REFERENCE, None, text)
        sink_rope = rp.rope(rp.sink_grids(4, 4, motion=False), config.head_dim)
    for block in range(2):
        flow, cache = stream_forward(
            model,
            cache,
            LATENT[:, 3 * block : 3 * block + 3],
            model.embed_time(jnp.asarray(timestep_sinusoid(TIMES[:, :3], config.freq_dim))),
            text,
            encode_audio(model.audio_encoder, AUDIO[..., 12 * block : 12 * block + 12]),
            ring_slot(block, tokens, tokens),
            rp.rope([rp.video_grid(3 * block, 3, 2, 2)], config.head_dim),
            sink_rope,
            unroll=unroll,
        )
    return flow


def largest(difference: jax.Array) -> float:
    return float(jnp.abs(difference).max())


# Ways that agree


def test_a_python_loop_over_the_layers_equals_the_scan() -> None:
    model = random_dit(CONFIG)
    np.testing.assert_allclose(stream(model, unroll=True), stream(model), atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_training_layer_by_layer_equals_the_scan_in_values_and_gradients(remat) -> None:
    model = random_dit(CONFIG)

    @jax.value_and_grad
    def loop(model: CausalDiT) -> jax.Array:
        return jnp.mean(jnp.square(train(model, unroll=True, remat=remat)))

    @jax.jit
    @jax.value_and_grad
    def scan(model: CausalDiT) -> jax.Array:
        return jnp.mean(jnp.square(train(model)))

    assert "cond[" not in str(jax.make_jaxpr(loop)(model))  # which layers are injected is known
    scan, loop = scan(model), jax.jit(loop)(model)
    for (path, a), b in zip(param_paths(scan).items(), jax.tree.leaves(loop), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4, err_msg=path)


def test_rematerialising_changes_neither_values_nor_gradients() -> None:
    model = random_dit(CONFIG)

    @functools.partial(jax.jit, static_argnames="remat")
    @jax.value_and_grad
    def both(model: CausalDiT, remat: Remat) -> jax.Array:
        return jnp.mean(jnp.square(train(model, remat=remat)))

    plain, *others = (both(model, remat=remat) for remat in ("none", "full", "dots"))
    for again in others:
        for (path, a), b in zip(param_paths(plain).items(), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4, err_msg=path)
    without = [path for path, leaf in param_paths(plain[1]).items() if np.abs(leaf).max() < 1e-7]
    assert without == [], "every parameter takes part"


def test_bfloat16_weights_run_and_stay_near_float32() -> None:
    model = random_dit(CONFIG)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    assert half.dtype == jnp.bfloat16
    for forward in (train, stream):
        got, want = forward(half), forward(model)
        assert got.dtype == jnp.float32
        assert 0 < float(jnp.std(got - want) / jnp.std(want)) < 0.03


def test_training_begins_silent() -> None:
    """Fresh heads predict zero and fresh injectors add nothing."""
    x, e = normal(0, 1, 12, CONFIG.width), normal(1, 1, 3, CONFIG.width)
    assert largest(Head(CONFIG, rngs=nnx.Rngs(0))(x, e, LATENT[:, :3])) == 0
    injector = AudioInjector(CONFIG.width, CONFIG.heads, rngs=nnx.Rngs(0))
    audio = AudioTokens(normal(2, 1, 1, 3, 5, CONFIG.width), normal(3, 1, 1, 3, CONFIG.width))
    np.testing.assert_array_equal(injector(x, audio), x)


def test_the_input_skip_adds_the_latent_times_a_gain_of_its_timestep() -> None:
    """With the same gain for all elements: what the head says without it, plus gain times latent."""
    model = nnx.clone(random_dit(dataclasses.replace(CONFIG, input_skip=True)))
    plain = random_dit(CONFIG)
    e, x = normal(1, 1, 3, CONFIG.width), normal(0, 1, 12, CONFIG.width)
    head = model.head
    head.linear, head.modulation = plain.head.linear, plain.head.modulation
    gain = head.gain(e)[0, 1].reshape(2, 2, 3)  # of the second frame, for rows and columns of a patch
    difference = (head(x, e, LATENT[:, :3]) - plain.head(x, e, LATENT[:, :3]))[0, 1]
    np.testing.assert_allclose(difference, jnp.tile(gain, (2, 2, 1)) * LATENT[0, 1], atol=1e-5)


# What may see what


def test_later_blocks_do_not_reach_earlier_ones() -> None:
    model = random_dit(CONFIG)
    changed = train(model, LATENT.at[:, 3:].add(1.0), AUDIO.at[..., 12:].add(1.0)) - train(model)
    assert largest(changed[:, :3]) < 1e-5
    assert largest(changed[:, 3:]) > 1e-2
    back = train(model, LATENT.at[:, :3].add(1.0)) - train(model)
    assert largest(back[:, 3:]) > 1e-3


def test_frames_of_a_block_see_each_other_both_ways() -> None:
    model = random_dit(CONFIG)
    assert largest((train(model, LATENT.at[:, 2].add(1.0)) - train(model))[:, :2]) > 1e-3


def test_each_frame_has_its_own_timestep() -> None:
    model = random_dit(CONFIG)
    t = TIMES.copy()
    t[:, 4] += 50
    changed = jnp.abs(train(model, t=t) - train(model)).max(axis=(0, 2, 3, 4))
    assert (changed[:3] < 1e-5).all()
    assert changed[4] > 1e-2


def test_the_teacher_sees_both_ways() -> None:
    model = random_dit(CONFIG)
    changed = teach(model, LATENT.at[:, 3:].add(1.0)) - teach(model)
    assert largest(changed[:, :3]) > 1e-3


def test_the_teacher_equals_the_causal_model_where_there_is_nothing_to_hide() -> None:
    """One block, and one layer: whatever condition tokens see then reaches no one."""
    model = random_dit(tiny_config(layers=1, inject_layers=(0,)))
    latent, audio, t = LATENT[:, :3], AUDIO[..., :12], np.full((1, 3), 500, np.float32)
    np.testing.assert_allclose(train(model, latent, audio, t), teach(model, latent, audio), atol=1e-5)


def test_the_mask_is_block_causal() -> None:
    """A block of two frames, a short one of one, and two condition tokens; rows are queries."""
    mask = block_causal_mask(frames=3, tokens_per_frame=1, cond=2, block_frames=2)
    want = ["11011", "11011", "11111", "00011", "00011"]
    assert ["".join(map(str, row)) for row in mask.astype(int)] == want


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("without", [None, (False, False), (True, False), (False, True), (True, True)])
def test_blocks_by_themselves_equal_a_mask(without: tuple[bool, bool] | None, implementation: Any) -> None:
    """With a short block at the end, and conditions that are there or not; values and gradients."""
    config = tiny_config(inject_layers=(0,), use_motion=True, attention=implementation)
    model, frames, tokens, reference = random_dit(config), 7, 16, 16
    n_cond = cond_tokens(config, 8, 8, motion=True)
    mask = block_causal_mask(frames, tokens, n_cond, config.block_frames)
    gone = np.zeros(len(mask), bool)
    gone[frames * tokens :] = np.where(np.arange(n_cond) < reference, *map(np.array, without or (False,) * 2))
    mask &= ~(~gone[:, None] & gone[None, :])
    latent, photo, motion = normal(1, 1, frames, 8, 8, 3), normal(2, 1, 1, 8, 8, 3), normal(5, 1, 19, 8, 8, 3)
    audio, t = normal(4, 1, 1, 2, 5, 4 * frames), np.linspace(100, 900, frames, dtype=np.float32)[None]

    @jax.jit
    @jax.value_and_grad
    def loss(model: CausalDiT, **options: Any) -> jax.Array:
        flow = train_forward(
            model, latent, t, text_BSE=TEXT, audio=audio, ref_B1HWC=photo, motion_BFHWC=motion, **options
        )
        return jnp.mean(jnp.square(flow - latent))

    options = {} if without is None else {"without": jnp.array(without)}
    (found, gradient), (expected, of_mask) = loss(model, **options), loss(model, mask=jnp.asarray(mask))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(of_mask), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3)


# Optional parts


def test_the_sink_may_be_off() -> None:
    """A sink of zero tokens: only the ring and the block itself are attended."""
    model = random_dit(CONFIG)
    n_noisy = FRAMES * 4
    mask = np.zeros((n_noisy + 4, n_noisy + 4), bool)
    block = np.arange(n_noisy) // 12
    mask[:n_noisy, :n_noisy] = block[:, None] == block[None]
    mask[n_noisy:, n_noisy:] = True
    t = np.tile(TIMES[:, :3], (1, 2))
    want = train(model, t=t, mask=mask, blockwise_audio=True)[:, 3:]
    np.testing.assert_allclose(stream(model, sink=False), want, atol=1e-5)
    assert largest(stream(model) - stream(model, sink=False)) > 1e-3


def test_without_a_pose_zeros_are_assumed() -> None:
    model = random_dit(tiny_config(use_pose=True))
    zeros = jnp.zeros_like(LATENT)
    np.testing.assert_allclose(train(model), train(model, pose_BFHWC=zeros), atol=1e-6)
    assert largest(train(model, pose_BFHWC=zeros + 1) - train(model)) > 1e-2
    with pytest.raises(ValueError, match="without a pose encoder"):
        train(random_dit(CONFIG), pose_BFHWC=zeros)


def test_positions_may_start_anywhere() -> None:
    """Only distances count: a clip and its reference, both moved far away, give the same."""
    model = random_dit(CONFIG)
    far = train_rope(CONFIG, FRAMES, 4, 4, frame_start=10**8, ref_frame=10**8 + 30)
    np.testing.assert_allclose(train(model, rope=far), train(model), atol=1e-4)
    other = train_rope(CONFIG, FRAMES, 4, 4, ref_frame=20)
    assert largest(train(model, rope=other) - train(model)) > 1e-3


def test_a_model_without_injectors_is_silent() -> None:
    model = random_dit(tiny_config(inject_layers=()))
    np.testing.assert_array_equal(train(model), train(model, audio=AUDIO + 1))


def test_motion_latents_below_8x8_are_refused() -> None:
    model = random_dit(tiny_config(use_motion=True))
    with pytest.raises(ValueError, match="at least 8x8"):
        train(model, motion_BFHWC=normal(0, 1, 19, 4, 4, 3))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_motion_tokens_are_as_many_as_their_positions(patch: int) -> None:
    size = 4 * patch
    model = random_dit(tiny_config(use_motion=True, patch=patch))
    tokens = model.motion_packer(normal(0, 1, 3, size, 2 * size, 3))
    assert tokens.shape[1] == sum(math.prod(grid.shape) for grid in rp.motion_grids(size, 2 * size, patch))


def test_a_sink_of_another_size_than_the_cache_is_refused() -> None:
    model = random_dit(CONFIG)
    with pytest.raises(ValueError, match="holds 5 sink tokens, the sink has 4"):
        prefill_sink(model, init_cache(CONFIG, 1, 5, 12), REFERENCE, None, model.text_keys_values(TEXT))


@pytest.mark.parametrize("change", [{"heads": 3}, {"width": 6, "heads": 2}, {"inject_layers": (2,)}])
def test_impossible_configurations_are_refused(change) -> None:
    with pytest.raises(ValueError, match=r"heads|inject_layers"):
        tiny_config(**change)


def test_traced_timesteps_are_nearly_as_good_as_numpy_ones() -> None:
    t = np.linspace(0, 1000, 50, dtype=np.float32)[None]
    np.testing.assert_allclose(timestep_sinusoid(jnp.asarray(t), 256), timestep_sinusoid(t, 256), atol=1e-4)


# Full size


@functools.cache
def full_size() -> dict[str, jax.ShapeDtypeStruct]:
    return param_paths(jax.eval_shape(lambda: CausalDiT(DiTConfig(), rngs=nnx.Rngs(0))))


def test_the_14b_model_has_the_published_number_of_parameters() -> None:
    assert sum(math.prod(leaf.shape) for leaf in full_size().values()) == 16_295_755_609


def test_every_key_of_the_14b_checkpoint_finds_its_place() -> None:
    """The converter's table on the list of real keys and shapes; nothing of that size is allocated."""
    manifest = json.loads(shared_path("manifests/wan22_s2v_14b_dit.json").read_text())
    assert len(manifest) == 1260
    layers: dict[str, set[int]] = {}
    for key, (shape, _) in manifest.items():
        matches = [(rule, match) for rule in DIT_RULES if (match := re.fullmatch(rule.pattern, key))]
        assert len(matches) == 1, key
        rule, match = matches[0]
        path = match.expand(rule.path)
        want = full_size()[path].shape
        if rule.stacked:
            seen = layers.setdefault(path, set())
            assert int(match["layer"]) not in seen
            seen.add(int(match["layer"]))
            want = want[1:]
        else:
            assert path not in layers
            layers[path] = set()
        tensor = np.broadcast_to(np.float16(0), shape)
        assert rule.resolve_transform().forward(tensor).shape == want, key
    assert layers.keys() == full_size().keys()
    stacks = {path: seen for path, seen in layers.items() if seen}
    assert stacks == {path: set(range(full_size()[path].shape[0])) for path in stacks}
    assert {len(seen) for seen in stacks.values()} == {40, 12}


def test_the_flash_kernel_is_refused_in_one_line_where_there_is_none() -> None:
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        stream(random_dit(tiny_config(layers=3, inject_layers=(0, 2), attention="cudnn")))
