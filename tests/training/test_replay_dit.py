"""The student streams as inference does; its replayed gradients are exact, and need one block's memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.config import SamplingConfig
from lavatar_jax.inference.denoise import denoise_block, fill_sink, init_rings, plan_block, start_session
from lavatar_jax.models.attention import RingSlot
from lavatar_jax.models.audio_encoder import encode_audio
from lavatar_jax.models.dit import timestep_sinusoid
from lavatar_jax.models.dit_forward import stream_forward
from lavatar_jax.training.distill import sampler_rollout
from lavatar_jax.training.self_forcing import (
    SelfForcingConfig,
    gradient_of_rollout,
    replay_gradient,
    roll_out,
)
from lavatar_jax.training.student import (
    BlockInputs,
    StudentCache,
    begin_cache,
    block_inputs,
    blocks_of,
    make_predict,
)
from lavatar_jax.types import BlockInput
from tests.tiny import normal, random_dit, tiny_config

MODEL = tiny_config()
BLOCKS, FRAMES = 4, MODEL.block_frames  # the ring holds two blocks, so that two are evicted
SAMPLING = SamplingConfig(steps=3, motion=False, adapt_sink_after=None, sink_distance=24, ring_blocks=2)
HISTORIES = ["noisy", "clean", "fixed_noise"]
PREDICT = make_predict(lambda model: model)


@dataclasses.dataclass(frozen=True)
class Clip:
    """Two clips' worth of random conditions, in the dtype that is wanted."""

    dtype: str = "float32"

    def draw(self, seed: int, *shape: int) -> jax.Array:
        return normal(seed, *shape).astype(self.dtype)

    @property
    def model(self):
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), random_dit(MODEL))

    @property
    def noise(self) -> jax.Array:
        return blocks_of(self.draw(1, 2, BLOCKS * FRAMES, 4, 4, 3), FRAMES)

    @property
    def renoise(self) -> jax.Array:
        return self.draw(6, BLOCKS, SAMPLING.steps, 2, FRAMES, 4, 4, 3)

    @property
    def text(self) -> jax.Array:
        return self.draw(4, 2, 4, 6)

    def inputs(self) -> BlockInputs:
        audio = self.draw(2, 2, 1, MODEL.audio_layers, MODEL.audio_dim, 4 * FRAMES * BLOCKS)
        return block_inputs(MODEL, SAMPLING, audio, (4, 4), jax.random.key(0))

    def cache(self, model, sampling: SamplingConfig, rings: int | None = None) -> StudentCache:
        return begin_cache(model, sampling, self.draw(3, 2, 1, 4, 4, 3), self.text, rings=rings)


@pytest.mark.parametrize("history", HISTORIES)
def test_the_students_rollout_is_inference(history: str) -> None:
    """Left at the last step, its results are the sampler's: every ring, slot and position agrees."""
    sampling, clip = dataclasses.replace(SAMPLING, history=history), Clip()
    model, inputs = clip.model, clip.inputs()
    config = sampler_rollout(SelfForcingConfig(transition="euler"), sampling)
    exits = jnp.full(BLOCKS, sampling.steps - 1)
    done = jax.jit(
        lambda model: roll_out(
            PREDICT, model, clip.noise, clip.renoise, exits, inputs, clip.cache(model, sampling), config
        )
    )(model)

    session = start_session(model, clip.text, None, sampling=sampling)
    rings = init_rings(MODEL, sampling, 2, 4, 4, model.dtype)
    rings = fill_sink(model, rings, clip.draw(3, 2, 1, 4, 4, 3), None, session.text, half_table=False)
    for block in range(BLOCKS):
        plan = plan_block(MODEL, sampling, block, 4, 4, [24] * 4)
        want, _, rings = denoise_block(
            model, rings, clip.noise[block], BlockInput(inputs.audio[block]), plan, session,
            clip.renoise[block, -1] if history == "fixed_noise" else None,
        )  # fmt: skip
        np.testing.assert_allclose(done.x0[block], want, atol=1e-4)


@jax.jit
def streamed(model, x, level, inputs: BlockInputs, cache: StudentCache):
    """The student's forward by the code of inference, on one ring."""
    times = model.embed_time(timestep_sinusoid(jnp.full(x.shape[:2], level.t), MODEL.freq_dim))
    flow, ring = stream_forward(
        model,
        cache.rings,
        x,
        times,
        model.text_keys_values(cache.text),
        encode_audio(model.audio_encoder, inputs.audio),
        RingSlot(inputs.offset, inputs.end),
        inputs.rope,
        inputs.sink_rope,
    )
    return x - level.sigma * flow, cache._replace(rings=ring)


def rollout_by_hand(model, clip: Clip, exit_step: int, config: SelfForcingConfig, cache: StudentCache):
    """All blocks in a Python loop, each step with its ring; gradient through each block's exit step only."""

    def ring(step: int) -> StudentCache:
        own = slice(step * MODEL.layers, (step + 1) * MODEL.layers)
        rings = dataclasses.replace(cache.rings, k=cache.rings.k[own], v=cache.rings.v[own])
        return cache._replace(rings=rings)

    rings = [ring(step) for step in range(SAMPLING.steps)]
    outputs = []
    for block in range(BLOCKS):
        x, inputs = clip.noise[block], jax.tree.map(lambda leaf, block=block: leaf[block], clip.inputs())
        for step in range(exit_step):
            x0, rings[step] = streamed(model, x, config.level(step), inputs, rings[step])
            level, following = np.float64(config.sigmas[step : step + 2])
            x = jax.lax.stop_gradient(x + (following - level) * (x - x0) / level)
        x0, filled = streamed(model, x, config.level(exit_step), inputs, rings[exit_step])
        rings = jax.lax.stop_gradient([*rings[:exit_step], filled, *rings[exit_step + 1 :]])
        outputs.append(x0)
    return jnp.stack(outputs)


@pytest.mark.parametrize("exit_step", range(SAMPLING.steps))
def test_replayed_gradients_are_those_of_full_backprop(exit_step: int) -> None:
    """Through the whole detached rollout, by the code of inference, in float64."""
    with jax.enable_x64(True):
        clip, config = Clip("float64"), sampler_rollout(SelfForcingConfig(transition="euler"), SAMPLING)
        pull, model = clip.draw(5, *clip.noise.shape), clip.model
        got_x0, got, at_once = by_replay(model, clip, jnp.full(BLOCKS, exit_step), pull)
        cache = clip.cache(model, SAMPLING)
        want_x0, transpose = jax.vjp(
            lambda model: rollout_by_hand(model, clip, exit_step, config, cache), model
        )
        want = transpose(pull)[0]
        np.testing.assert_allclose(got_x0, want_x0, rtol=0, atol=1e-10)
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
        assert scale > 0
        for found in (got, at_once):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * scale), found, want
            )


@functools.partial(jax.jit, static_argnums=1)
def by_replay(model, clip: Clip, exits, pull):
    config = sampler_rollout(SelfForcingConfig(transition="euler"), SAMPLING)
    inputs, cache = clip.inputs(), clip.cache(model, SAMPLING)
    done = roll_out(PREDICT, model, clip.noise, None, exits, inputs, cache, config)
    learning, one = jnp.ones(BLOCKS, bool), clip.cache(model, SAMPLING, rings=1)
    given = (PREDICT, model, done, inputs, one, pull, learning, config)
    return done.x0, replay_gradient(*given), gradient_of_rollout(*given)


def temporaries(blocks: int) -> int:
    """Bytes that rollout and replay of so many blocks need beside arguments and results."""
    model_config = tiny_config(layers=4, width=32, ffn_width=96, latent_channels=1, inject_layers=(1,))
    sampling = dataclasses.replace(SAMPLING, ring_blocks=4)
    config = sampler_rollout(SelfForcingConfig(transition="euler", grad_frames=10**6), sampling)

    def gradient(model, noise, audio, reference, text, slope):
        inputs = block_inputs(model_config, sampling, audio, (16, 16), jax.random.key(0))
        cache = begin_cache(model, sampling, reference, text)
        exits, learning = jnp.full(blocks, 1), jnp.ones(blocks, bool)
        done = roll_out(PREDICT, model, noise, None, exits, inputs, cache, config)
        one = begin_cache(model, sampling, reference, text, rings=1)
        return replay_gradient(PREDICT, model, done, inputs, one, slope + done.x0, learning, config)

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    clips = shape(blocks, 1, FRAMES, 16, 16, 1)
    audio = shape(1, 1, model_config.audio_layers, model_config.audio_dim, 4 * FRAMES * blocks)
    compiled = (
        jax.jit(gradient)
        .lower(random_dit(model_config), clips, audio, shape(1, 1, 16, 16, 1), shape(1, 4, 6), clips)
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_that_of_one_block_however_many_there_are() -> None:
    few, many = temporaries(7), temporaries(21)
    assert few > 500_000
    assert many < 1.1 * few
