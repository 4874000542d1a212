"""Replayed gradients of a small transformer with sink, audio and a window of two blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lavatar_jax.models import rope as rp
from lavatar_jax.models.attention import RingSlot, init_cache
from lavatar_jax.models.audio_encoder import encode_audio
from lavatar_jax.models.dit import timestep_sinusoid
from lavatar_jax.models.dit_forward import prefill_sink, stream_forward
from lavatar_jax.training.self_forcing import SelfForcingConfig, replay_gradient, roll_out
from tests.tiny import normal, random_dit, tiny_config

CONFIG = SelfForcingConfig(steps=(1000, 500))
MODEL = tiny_config()
BLOCKS, WINDOW, TOKENS = 3, 2, 12  # 3 frames of 2 x 2 tokens a block
SHAPE = (1, 3, 4, 4, 3)
SINK_ROPE = rp.rope(rp.sink_grids(4, 4, motion=False), MODEL.head_dim)


def block_inputs():
    """Audio, positions and slots of all blocks, with a leading block axis. Slots hold the whole video."""
    ends = TOKENS * (1 + jnp.arange(BLOCKS))
    slots = RingSlot(ends - TOKENS, ends, jnp.maximum(0, ends - WINDOW * TOKENS))
    tables = [rp.rope([rp.video_grid(3 * block, 3, 2, 2)], MODEL.head_dim) for block in range(BLOCKS)]
    features = normal(5, BLOCKS, 1, 1, MODEL.audio_layers, MODEL.audio_dim, 12)
    return features, jax.tree.map(lambda *parts: jnp.stack(parts), *tables), slots


def predict(model, x, t, inputs, cache):
    features, table, slot = inputs
    t_BF = jnp.full(x.shape[:2], t)
    times = model.embed_time(timestep_sinusoid(t_BF, MODEL.freq_dim))
    audio, text = encode_audio(model.audio_encoder, features), model.text_keys_values(normal(6, 1, 4, 6))
    flow, cache = stream_forward(model, cache, x, times, text, audio, slot, table, SINK_ROPE)
    return CONFIG.grid.flow_to_x0(x, flow, t), cache


@jax.jit
def start(model):
    cache = init_cache(MODEL, 1, 4, BLOCKS * TOKENS, model.dtype)
    return prefill_sink(
        model, cache, normal(7, 1, 1, 4, 4, 3), None, model.text_keys_values(normal(6, 1, 4, 6))
    )


@functools.partial(jax.jit, static_argnums=4)
def rollout_by_hand(model, noise, renoise, cache, exit_step):
    """All blocks in a Python loop, with gradient through each block's exit step only."""
    outputs = []
    for block in range(BLOCKS):
        x, inputs = noise[block], jax.tree.map(lambda leaf, block=block: leaf[block], block_inputs())
        for step in range(exit_step):
            x0, cache = jax.lax.stop_gradient(predict(model, x, CONFIG.timesteps[step], inputs, cache))
            x = CONFIG.grid.add_noise(x0, renoise[block, step], CONFIG.timesteps[step + 1])
        x0, cache = predict(model, x, CONFIG.timesteps[exit_step], inputs, cache)
        cache = jax.lax.stop_gradient(cache)
        outputs.append(x0)
    return jnp.stack(outputs)


def test_replayed_gradients_of_a_transformer() -> None:
    """In float32, which is what the head and the attention compute in; exactness is for the small student."""
    exit_step = 1
    model, inputs = random_dit(MODEL), block_inputs()
    noise, renoise = normal(1, BLOCKS, *SHAPE), normal(2, BLOCKS, 2, *SHAPE)
    pull, cache = normal(3, BLOCKS, *SHAPE), start(model)

    @jax.jit
    def by_replay(model):
        exits = jnp.full(BLOCKS, exit_step)
        done = roll_out(predict, model, noise, renoise, exits, inputs, cache, CONFIG)
        return done.x0, replay_gradient(predict, model, done, inputs, pull, jnp.ones(BLOCKS, bool))

    @jax.jit
    def by_backprop(model):
        results, transpose = jax.vjp(
            lambda model: rollout_by_hand(model, noise, renoise, cache, exit_step), model
        )
        return results, transpose(pull)[0]

    (x0, got), (results, want) = by_replay(model), by_backprop(model)
    np.testing.assert_allclose(x0, results, atol=1e-4)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    assert scale > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale), got, want)
