"""The ring of past blocks: its slots against an explicit window, for as long as one likes."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavatar_jax.models import attention
from lavatar_jax.models import rope as rp
from lavatar_jax.models.attention import (
    KV,
    dot_product_attention,
    flash_serves,
    init_cache,
    ring_attention,
    ring_slot,
)
from tests.tiny import normal, tiny_config

RINGS = st.tuples(st.integers(1, 9), st.integers(1, 5))  # blocks in the ring, tokens in a block


@given(ring=RINGS, total=st.integers(1, 60))
def test_slots_hold_the_newest_blocks(ring, total) -> None:
    """Write block numbers where `ring_slot` says, and compare with a list of the last blocks."""
    blocks, tokens = ring
    memory = np.full(blocks * tokens, -1)
    for block in range(total):
        slot = ring_slot(block, tokens, blocks * tokens)
        memory[slot.offset : slot.offset + tokens] = block
        window = range(max(0, block - blocks + 1), block + 1)
        assert sorted(memory[: slot.end]) == sorted(np.repeat(window, tokens))
        assert (memory[slot.end :] == -1).all()
        assert slot.start is None


@given(ring=RINGS, block=st.integers(2**40, 2**70))
def test_blocks_never_grow_too_large(ring, block) -> None:
    """What goes to the device depends on the block's place in the ring only, and fits 32 bits."""
    blocks, tokens = ring
    slot = ring_slot(block, tokens, blocks * tokens)
    assert slot == ring_slot(block % blocks + blocks, tokens, blocks * tokens)
    assert slot.end == blocks * tokens
    assert slot.offset == block % blocks * tokens < 2**31
    assert ring_slot(block + 1, tokens, blocks * tokens).offset == (slot.offset + tokens) % slot.end


@given(ring=RINGS, local=st.integers(1, 50))
def test_local_attention_sees_the_latest_tokens_until_the_ring_wraps(ring, local) -> None:
    blocks, tokens = ring
    for block in range(blocks):
        slot = ring_slot(block, tokens, blocks * tokens, local_tokens=local)
        assert slot.end == (block + 1) * tokens
        assert slot.end - slot.start == min(local, slot.end)
    with pytest.raises(ValueError, match="until the ring wraps"):
        ring_slot(blocks, tokens, blocks * tokens, local_tokens=local)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_local_attention_is_attention_to_sink_and_latest_tokens_alone(implementation) -> None:
    sink_tokens, tokens, heads, dim, layer, local = 3, 4, 2, 8, 1, 6
    unmoved, sink_unmoved = (
        rp.Rope(np.ones((count, dim // 2), np.float32), np.zeros((count, dim // 2), np.float32))
        for count in (tokens, sink_tokens)
    )
    ring = KV(*(normal(key, 2, 1, sink_tokens + 3 * tokens, heads, dim) for key in range(2)))
    q, k, v = (normal(key, 1, tokens, heads, dim) for key in range(2, 5))
    sink_k = normal(5, 1, sink_tokens, heads, dim)
    slot = ring_slot(1, tokens, 3 * tokens, local_tokens=local)
    got, written = ring_attention(
        layer, q, KV(k, v), ring, sink_k, slot, unmoved, sink_unmoved, implementation=implementation
    )
    seen = slice(sink_tokens + 2 * tokens - local, sink_tokens + tokens)
    keys = jnp.concatenate([sink_k, ring.k[layer, :, seen], k], axis=1)
    values = jnp.concatenate([ring.v[layer, :, :sink_tokens], ring.v[layer, :, seen], v], axis=1)
    np.testing.assert_allclose(got, dot_product_attention(q, keys, values), rtol=1e-5, atol=1e-6)
    place = slice(sink_tokens + tokens, sink_tokens + 2 * tokens)
    np.testing.assert_array_equal(written.k[layer, :, place], k)
    np.testing.assert_array_equal(written.v[0], ring.v[0])


def test_a_ring_of_part_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens is not a whole number of blocks of 4"):
        ring_slot(0, 4, 10)


def test_an_empty_cache_has_the_sink_in_front() -> None:
    cache = init_cache(tiny_config(), 3, 5, 12, jnp.bfloat16)
    assert cache.k.shape == cache.v.shape == (2, 3, 17, 2, 8)
    assert cache.sink_k.shape == (2, 3, 5, 2, 8)
    assert (cache.sink_tokens, cache.ring_tokens) == (5, 12)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}


def test_keys_beyond_the_length_do_not_exist() -> None:
    q, k, v = (normal(i, 2, tokens, 2, 8) for i, tokens in enumerate((3, 7, 7)))
    want = dot_product_attention(q, k[:, :4], v[:, :4])
    poisoned = v.at[:, 4:].set(1e9)
    np.testing.assert_allclose(dot_product_attention(q, k, poisoned, length=4), want, atol=1e-6)
    mask = np.arange(7)[None] < np.full((3, 1), 4)
    np.testing.assert_allclose(dot_product_attention(q, k, poisoned, mask=mask), want, atol=1e-6)


HOPPER, TURING = (SimpleNamespace(platform="gpu", compute_capability=number) for number in ("9.0", "7.5"))
AMD = SimpleNamespace(platform="gpu", compute_capability="gfx942")
TPU = SimpleNamespace(platform="tpu")


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "masked", "served"),
    [
        (HOPPER, "bfloat16", 128, False, True),
        (HOPPER, "float16", 64, False, True),
        (SimpleNamespace(platform="gpu", compute_capability="10.0"), "bfloat16", 128, False, True),
        (HOPPER, "float32", 128, False, False),
        (HOPPER, "bfloat16", 128, True, False),
        (HOPPER, "bfloat16", 12, False, False),
        (HOPPER, "bfloat16", 136, False, False),
        (TURING, "bfloat16", 128, False, False),
        (AMD, "bfloat16", 128, False, False),
        (TPU, "bfloat16", 128, False, False),
        (None, "bfloat16", 128, False, False),  # the CPU of the tests
    ],
)
def test_the_flash_kernel_is_chosen_where_it_can_serve(device, dtype, head_dim, masked, served) -> None:
    q = jax.ShapeDtypeStruct((1, 4, 2, head_dim), dtype)
    assert flash_serves(q, np.ones((4, 4), bool) if masked else None, device) is served


@pytest.mark.parametrize("found", [True, False])
def test_auto_computes_with_what_was_chosen(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attend(q, k, v, *, implementation, **_):
        asked.append(implementation)
        return q

    monkeypatch.setattr(attention, "flash_serves", lambda q, mask: found and mask is None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    q = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    for mask in (None, np.ones((4, 4), bool)):
        dot_product_attention(q, q, q, mask=mask, implementation="auto")
    assert asked == ["cudnn" if found else "xla", "xla"]


def test_on_a_cpu_auto_is_the_same_program() -> None:
    def text(kind: str) -> str:
        q = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.bfloat16)
        attend = functools.partial(dot_product_attention, length=3, implementation=kind)
        return jax.jit(lambda q: attend(q, q, q)).lower(q).as_text()

    assert text("auto") == text("xla")
