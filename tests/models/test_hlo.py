"""Guards on the compiled streaming step: the cache must be updated in place, never copied.

At real size one ring is 10 GiB and more; a copy of it would decide whether a model fits.
"""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.config import SamplingConfig
from lavatar_jax.inference.denoise import (
    denoise_block,
    forwards_per_block,
    init_rings,
    plan_block,
    start_session,
)
from lavatar_jax.models.attention import KV, RingCache
from lavatar_jax.models.audio_encoder import encode_audio
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.dit_forward import stream_forward
from lavatar_jax.types import BlockInput
from tests.tiny import tiny_config

# Sizes that no other array has, and a cache much larger than everything else.
CONFIG = tiny_config(layers=29, width=24, heads=3, inject_layers=(0, 7))
HEIGHT = WIDTH = 4
RING_BLOCKS = 41


def abstract_step(history: str = "noisy"):
    """Arguments of `denoise_block` as shapes, for two steps; nothing is allocated or computed."""
    sampling = SamplingConfig(steps=2, ring_blocks=RING_BLOCKS, motion=False, history=history)
    dit = jax.eval_shape(lambda: CausalDiT(CONFIG, rngs=nnx.Rngs(0)))
    rings = jax.eval_shape(lambda: init_rings(CONFIG, sampling, 1, HEIGHT, WIDTH, jnp.float32))
    text = jnp.zeros((1, CONFIG.text_len, CONFIG.text_dim))
    session = jax.eval_shape(lambda dit: start_session(dit, text, None, sampling=sampling), dit)
    latent = jax.ShapeDtypeStruct((1, 3, HEIGHT, WIDTH, 3), jnp.float32)
    inputs = BlockInput(jax.ShapeDtypeStruct((1, 1, 2, 5, 12), jnp.float32))
    plan = plan_block(CONFIG, sampling, 0, HEIGHT, WIDTH, [4] * forwards_per_block(sampling))
    return dit, rings, latent, inputs, plan, session, latent if history == "fixed_noise" else None


def makers(compiled: jax.stages.Compiled, shape: tuple[int, ...]) -> Counter:
    """The instructions of the optimised program that result in an array of this shape, by name.

    A fusion that ends in a dynamic-update-slice writes in place and counts as such.
    """
    text = compiled.as_text()
    computation = r"^%?([\w.-]+) \([^\n]*\{\n(?:(?!^\}).*\n)*?\s+ROOT [^=]*= \S+ ([\w-]+)\("
    roots = dict(re.findall(computation, text, re.M))
    result = re.escape(f"f32[{','.join(map(str, shape))}]")
    count: Counter = Counter()
    for name, rest in re.findall(rf"= {result}\S* ([\w-]+)\(([^\n]*)", text):
        called = re.search(r"calls=%?([\w.-]+)", rest)
        count[f"fusion of {roots.get(called[1])}" if called else name] += 1
    return count


IN_PLACE = {
    "parameter",
    "get-tuple-element",
    "bitcast",
    "dynamic-update-slice",
    "fusion of dynamic-update-slice",
}


def check_in_place(compiled: jax.stages.Compiled, rings: tuple[RingCache, ...]) -> None:
    made = makers(compiled, rings[0].k.shape)
    assert made["fusion of dynamic-update-slice"] + made["dynamic-update-slice"] > 0, made
    assert set(made) <= IN_PLACE, made
    memory, ring_bytes = compiled.memory_analysis(), 4 * rings[0].k.size
    # The results lie where the arguments were, and there is not even room for one copy.
    assert memory.alias_size_in_bytes >= 2 * len(rings) * ring_bytes
    assert memory.temp_size_in_bytes < ring_bytes


def streaming_step(donate: bool) -> tuple[jax.stages.Compiled, RingCache]:
    dit, (cache, _), latent, inputs, plan, session, _ = abstract_step()
    audio = jax.eval_shape(lambda dit, x: encode_audio(dit.audio_encoder, x), dit, inputs.audio)
    step = jax.jit(stream_forward, donate_argnames="cache" if donate else ())
    arguments = (latent, session.times[0], session.text, audio, plan.slot, plan.rope, plan.sink_ropes[0])
    return step.lower(dit, cache, *arguments).compile(), cache


def test_the_streaming_step_never_copies_the_cache() -> None:
    compiled, cache = streaming_step(donate=True)
    check_in_place(compiled, (cache,))


@pytest.mark.parametrize("history", ["noisy", "fixed_noise"])
def test_a_whole_block_never_copies_a_ring(history: str) -> None:
    arguments = abstract_step(history)
    check_in_place(denoise_block.lower(*arguments).compile(), arguments[1])


def test_the_guard_notices_a_cache_that_is_not_donated() -> None:
    compiled, cache = streaming_step(donate=False)
    assert makers(compiled, cache.k.shape)["copy"] > 0
    with pytest.raises(AssertionError):
        check_in_place(compiled, (cache,))


def test_the_guard_notices_a_cache_that_is_scanned_over() -> None:
    """The natural way to write it, keys as xs and ys of the layer scan, makes copies."""
    shape = (29, 1, 64, 3, 8)

    def scanned(cache: KV, new: jax.Array) -> KV:
        def layer(x, kv):
            kv = KV(*(jax.lax.dynamic_update_slice(part, x, (0, 5, 0, 0)) for part in kv))
            return x + kv.k[:, :1], kv

        return jax.lax.scan(layer, new, cache)[1]

    cache = KV(*[jax.ShapeDtypeStruct(shape, jnp.float32)] * 2)
    compiled = jax.jit(scanned, donate_argnums=0).lower(cache, jnp.zeros((1, 1, 3, 8))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes >= 4 * np.prod(shape)
