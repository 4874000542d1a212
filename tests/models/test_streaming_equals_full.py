"""The key test: blocks streamed through the ring equal one masked pass over the whole clip.

Both orders of computation share only the block itself: one keeps keys and values of earlier blocks, the
other recomputes all of them under a mask. Slots, wrap-around, positions, the sink and the per-block audio,
pose and actor masks all have to agree.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lavatar_jax.models import rope as rp
from lavatar_jax.models.attention import RingSlot, init_cache, ring_slot
from lavatar_jax.models.audio_encoder import encode_audio
from lavatar_jax.models.dit import timestep_sinusoid
from lavatar_jax.models.dit_forward import (
    block_causal_mask,
    cond_tokens,
    prefill_sink,
    stream_forward,
    train_forward,
    train_rope,
)
from tests.tiny import normal, random_dit, tiny_config

full = jax.jit(train_forward, static_argnames="blockwise_audio")


@jax.jit
def prefill(model, cache, reference, motion, states):
    return prefill_sink(model, cache, reference, motion, model.text_keys_values(states))


@functools.partial(jax.jit, donate_argnames="cache")
def step(model, cache, latent, sinusoid, states, audio, slot, rope, sink_rope, pose, mask):
    """One block, with the embeddings that a session computes once."""
    times, text = model.embed_time(sinusoid), model.text_keys_values(states)
    audio = encode_audio(model.audio_encoder, audio)
    extras = {"pose_BFHWC": pose, "actor_mask_BPFHW": mask}
    return stream_forward(model, cache, latent, times, text, audio, slot, rope, sink_rope, **extras)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A small model and a clip of `blocks` blocks that sees `ring` of them."""

    blocks: int = 4
    ring: int = 2
    block_frames: int = 2
    height: int = 4
    width: int = 4
    heads: int = 2
    speakers: int = 1
    motion: bool = False
    pose: bool = False
    actor_mask: bool = False
    input_skip: bool = False
    frame_start: int = 0  # absolute latent frame of the clip
    sink_frame: int = 30  # where the reference stands
    seed: int = 0

    @property
    def frames(self) -> int:
        return self.blocks * self.block_frames

    @property
    def block_tokens(self) -> int:
        return self.block_frames * (self.height // 2) * (self.width // 2)


@st.composite
def setups(draw) -> Setup:
    motion = draw(st.booleans())
    return Setup(
        blocks=draw(st.integers(2, 5)),
        ring=draw(st.integers(1, 3)),
        block_frames=draw(st.integers(1, 3)),
        height=8 if motion else draw(st.sampled_from([4, 6])),  # the packer needs 8
        width=8 if motion else 4,
        heads=draw(st.sampled_from([1, 2])),
        speakers=draw(st.integers(1, 2)),
        motion=motion,
        pose=draw(st.booleans()),
        actor_mask=draw(st.booleans()),
        input_skip=draw(st.booleans()),
        frame_start=draw(st.sampled_from([0, 300_000])),
        # The sink is filled once, with the reference at 30, and rolls afterwards. That equals one pass
        # with a moved reference as long as no motion frames, which never move, see the reference.
        sink_frame=30 if motion else draw(st.sampled_from([30, 300_017])),
        seed=draw(st.integers(0, 1000)),
    )


class Clip:
    """Random inputs of a setup, for a batch of two whose frames are all at different noise levels."""

    def __init__(self, s: Setup) -> None:
        config = tiny_config(
            heads=s.heads,
            block_frames=s.block_frames,
            use_motion=s.motion,
            use_pose=s.pose,
            input_skip=s.input_skip,
            inject_layers=(0, 1),
        )
        self.setup, self.model = s, random_dit(config)
        size = (s.height, s.width, config.latent_channels)
        rows, columns = s.height // config.patch, s.width // config.patch
        self.latent = normal(s.seed, 2, s.frames, *size)
        self.t = np.random.default_rng(s.seed).uniform(0, 1000, (2, s.frames)).astype(np.float32)
        self.states = normal(s.seed + 5, 2, config.text_len, config.text_dim)
        self.audio = normal(s.seed + 1, 2, s.speakers, config.audio_layers, config.audio_dim, 4 * s.frames)
        self.reference = normal(s.seed + 2, 2, 1, *size)
        self.motion = normal(s.seed + 3, 2, 19, *size) if s.motion else None
        self.pose = normal(s.seed + 4, 2, s.frames, *size) if s.pose else None
        # One mask for every block, as the reference has it.
        mask = np.random.default_rng(s.seed).random((2, s.speakers, s.block_frames, rows, columns)) < 0.6
        self.mask = jnp.asarray(mask, jnp.float32) if s.actor_mask else None

    def in_one_pass(self) -> jax.Array:
        """Every block sees itself, `ring - 1` blocks before it, and the sink; the sink sees itself."""
        s, config = self.setup, self.model.config
        n_cond = cond_tokens(config, s.height, s.width, motion=s.motion)
        mask = block_causal_mask(s.frames, s.block_tokens // s.block_frames, n_cond, s.block_frames)
        block = np.arange(s.frames * s.block_tokens // s.block_frames) // s.block_tokens
        noisy = len(block)
        mask[:noisy, :noisy] &= block[:, None] - block[None, :] < s.ring
        table = train_rope(
            config,
            s.frames,
            s.height,
            s.width,
            frame_start=s.frame_start,
            ref_frame=s.sink_frame,
            motion=s.motion,
        )
        return full(
            self.model,
            self.latent,
            self.t,
            text_BSE=self.states,
            audio=self.audio,
            ref_B1HWC=self.reference,
            motion_BFHWC=self.motion,
            pose_BFHWC=self.pose,
            actor_mask_BPFHW=None if self.mask is None else jnp.tile(self.mask, (1, 1, s.blocks, 1, 1)),
            rope=table,
            blockwise_audio=True,
            mask=jnp.asarray(mask),
        )

    def streamed(
        self,
        *,
        slot_of: Callable[..., RingSlot] = ring_slot,
        sink_frame: int | None = None,
        audio_delay: int = 0,
    ) -> np.ndarray:
        """Block after block; the options are for breaking it."""
        s, model, config = self.setup, self.model, self.model.config
        rows, columns = s.height // config.patch, s.width // config.patch
        n_cond = cond_tokens(config, s.height, s.width, motion=s.motion)
        cache = init_cache(config, 2, n_cond, s.ring * s.block_tokens)
        cache = prefill(model, cache, self.reference, self.motion, self.states)
        sink = rp.sink_grids(s.height, s.width, config.patch, (sink_frame or s.sink_frame) - 30, s.motion)
        audio = np.roll(self.audio, audio_delay, axis=-1)
        flows = []
        for block in range(s.blocks):
            piece = slice(block * s.block_frames, (block + 1) * s.block_frames)
            grid = rp.video_grid(s.frame_start + piece.start, s.block_frames, rows, columns)
            flow, cache = step(
                model,
                cache,
                self.latent[:, piece],
                timestep_sinusoid(self.t[:, piece], config.freq_dim),
                self.states,
                audio[..., 4 * piece.start : 4 * piece.stop],
                slot_of(block, s.block_tokens, s.ring * s.block_tokens),
                rp.rope([grid], config.head_dim),
                rp.rope(sink, config.head_dim),
                None if self.pose is None else self.pose[:, piece],
                self.mask,
            )
            flows.append(np.asarray(flow))
        return np.concatenate(flows, axis=1)


EVERYTHING = Setup(
    blocks=5, ring=2, block_frames=3, height=8, width=8, speakers=2, motion=True, pose=True, actor_mask=True
)


@settings(max_examples=4)
@given(setup=setups())
@example(setup=Setup(blocks=5, ring=3, sink_frame=47, input_skip=True))
@example(setup=EVERYTHING)
def test_streaming_through_the_ring_equals_one_masked_pass(setup: Setup) -> None:
    clip = Clip(setup)
    want = np.asarray(clip.in_one_pass())
    assert 0.1 < want.std() < 10
    np.testing.assert_allclose(clip.streamed(), want, atol=2e-5, rtol=2e-5)


def next_slot(block: int, block_tokens: int, ring_tokens: int) -> RingSlot:
    """Off by one block, though the same number of tokens is valid."""
    slot = ring_slot(block, block_tokens, ring_tokens)
    return slot._replace(offset=(slot.offset + block_tokens) % ring_tokens)


def straight_slot(block: int, block_tokens: int, ring_tokens: int) -> RingSlot:
    """A ring that does not wrap, but overwrites its end."""
    return ring_slot(min(block, ring_tokens // block_tokens - 1), block_tokens, ring_tokens)


@pytest.mark.parametrize(
    "broken", [{"slot_of": next_slot}, {"slot_of": straight_slot}, {"sink_frame": 31}, {"audio_delay": 1}]
)
def test_the_comparison_notices_a_broken_stream(broken) -> None:
    clip = Clip(Setup())
    assert np.abs(clip.streamed(**broken) - clip.streamed()).max() > 1e-3


def test_the_window_matters() -> None:
    """Another block of the past gives other numbers, so the window in the mask above is under test."""
    short, long = (Clip(Setup(ring=ring)).streamed() for ring in (2, 3))
    np.testing.assert_allclose(short[:, :4], long[:, :4], atol=1e-5)
    assert np.abs(short - long)[:, 4:].max() > 1e-3
