"""The causal S2V diffusion transformer: its modules, and the layer loop that all its forwards share.

The ways to run it (sink prefill, streaming, training, teacher) are functions in `dit_forward.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lavatar_jax.config import DiTConfig
from lavatar_jax.models.attention import KV, Attention
from lavatar_jax.models.audio_encoder import AudioTokens, CausalAudioEncoder
from lavatar_jax.models.audio_injector import AudioInjector
from lavatar_jax.models.layers import MLP, LayerNorm, Linear, PatchEmbed, gelu_tanh, layer_norm, spread, widen
from lavatar_jax.models.motion_packer import MotionPacker
from lavatar_jax.parallel import gather_parts, is_sharded, split_samples

Remat = Literal["none", "full", "dots"]

NOISY, REFERENCE, MOTION = 0, 1, 2  # rows of the condition-mask embedding


class Times(NamedTuple):
    """Embedded timesteps of R frames: `e` for the head, `e0` for the six modulations of a block."""

    e: Float[Array, "B R D"]
    e0: Float[Array, "B R 6 D"]


class Sequence(NamedTuple):
    """How tokens are laid out: `frames` noisy latent frames, then `cond` reference and motion tokens."""

    frames: int
    tokens_per_frame: int
    cond: int = 0

    @property
    def noisy(self) -> int:
        return self.frames * self.tokens_per_frame


class Block(nnx.Module):
    """Self-attention, text cross-attention, feed-forward; modulated per frame by the timestep."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.self_attn = Attention(width, config.heads, rngs=rngs)
        self.cross_attn = Attention(width, config.heads, rngs=rngs, implementation=config.attention)
        self.norm3 = LayerNorm(width)
        self.ffn = MLP(width, config.ffn_width, width, gelu_tanh, rngs=rngs)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, width)) / math.sqrt(width))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        e0_BR6D: Float[Array, "B R 6 D"],
        text: KV,
        attend: Callable[[Float[Array, "B T N H"], KV], tuple[Float[Array, "B T N H"], Any]],
        sequence: Sequence,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """`attend(q, kv)` does the self-attention (rope, cache, mask) and may return a new state."""
        dtype = x_BTD.dtype
        rows = widen(self.modulation[...]) + e0_BR6D
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (
            spread(rows[:, :, i], *sequence) for i in range(6)
        )
        h = (layer_norm(x_BTD) * (1 + scale_sa) + shift_sa).astype(dtype)
        y, state = attend(self.self_attn.queries(h), self.self_attn.keys_values(h))
        x = (x_BTD + gate_sa * self.self_attn.output(y)).astype(dtype)
        x = x + self.cross_attn.cross(self.norm3(x), text)
        h = (layer_norm(x) * (1 + scale_ff) + shift_ff).astype(dtype)
        return (x + gate_ff * self.ffn(h)).astype(dtype), state


class Head(nnx.Module):
    """Modulated norm and projection to the velocity of each patch, in float32.

    With `config.input_skip` the noisy latent is added, every element of a patch times a gain that depends on
    the timestep. A patch of a small model has more elements than the model is wide, so its tokens cannot
    carry all of the noise that the velocity contains; by the skip they need not.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, config.width)) / config.width**0.5)
        n_out = config.patch**2 * config.latent_channels
        self.linear = Linear(config.width, n_out, rngs=rngs, zero=True, float32=True)
        if config.input_skip:
            self.gain = Linear(config.width, n_out, rngs=rngs, zero=True, float32=True)
        self.patch, self.input_skip = config.patch, config.input_skip

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        e_BFD: Float[Array, "B F D"],
        latent_BFHWC: Float[Array, "B F H W C"],
    ) -> Float[Array, "B F H W C"]:
        """Tokens (T = F * rows * columns) and what was noisy about them -> velocity.

        Rows and columns of the latent that do not fill a patch are cut off.
        """
        batch, frames, height = latent_BFHWC.shape[:3]
        e = widen(self.modulation[...])[:, None] + e_BFD[:, None]  # [B, 2, F, D]
        shift, scale = (spread(e[:, i], frames, x_BTD.shape[1] // frames, 0) for i in range(2))
        y = self.linear(layer_norm(x_BTD) * (1 + scale) + shift)
        p, rows = self.patch, height // self.patch
        y = y.reshape(batch, frames, rows, -1, p, p, y.shape[-1] // p**2)
        y = y.transpose(0, 1, 2, 4, 3, 5, 6)  # [B, F, rows, p, columns, p, C]
        if self.input_skip:
            columns, channels = y.shape[4], y.shape[6]
            latent = latent_BFHWC[:, :, : rows * p, : columns * p].astype(y.dtype).reshape(y.shape)
            gain = self.gain(e_BFD).reshape(batch, frames, 1, p, 1, p, channels)
            y = y + gain * latent
        return y.reshape(batch, frames, rows * p, -1, y.shape[-1])


class CausalDiT(nnx.Module):
    """All parameters of the S2V transformer. Blocks and injectors are stacked along a leading axis."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        width, patch = config.width, (1, config.patch, config.patch)
        self.config = config
        self.patch_embed = PatchEmbed(patch, config.latent_channels, width, rngs=rngs)
        if config.use_pose:
            self.pose_embed = PatchEmbed(patch, config.latent_channels, width, rngs=rngs, zero=True)
        if config.use_motion:
            self.motion_packer = MotionPacker(config.latent_channels, width, config.patch, rngs=rngs)
        self.cond_mask = nnx.Param(0.02 * jax.random.normal(rngs.params(), (3, width)))
        self.text_embed = MLP(config.text_dim, width, width, gelu_tanh, rngs=rngs)
        self.time_embed = MLP(config.freq_dim, width, width, jax.nn.silu, rngs=rngs, float32=True)
        self.time_project = Linear(width, 6 * width, rngs=rngs, float32=True)
        self.audio_encoder = CausalAudioEncoder(config, rngs=rngs)

        def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int) -> Any:
            return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))

        self.blocks = stack(lambda r: Block(config, rngs=r), config.layers)
        if config.inject_layers:
            self.injectors = stack(
                lambda r: AudioInjector(width, config.heads, rngs=r), len(config.inject_layers)
            )
        self.head = Head(config, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype that tokens are computed in."""
        return self.patch_embed.weight[...].dtype

    def embed_text(self, states_BSE: Float[Array, "B S E"]) -> Float[Array, "B S D"]:
        """Prompt states, zero-padded to `text_len`, -> context. Padding rows are attended, as trained."""
        return self.text_embed(states_BSE)

    def text_keys_values(self, states_BSE: Float[Array, "B S E"]) -> KV:
        """Keys and values of the prompt for every layer, [L, B, S, N, H]: once per session."""
        context = self.embed_text(states_BSE)

        def project(block: Block) -> KV:
            return gather_parts(block.cross_attn, "blocks.cross_attn.").keys_values(context)

        # Split over devices, the layers are gathered one by one and not all at once.
        return jax.lax.map(project, self.blocks) if is_sharded() else jax.vmap(project)(self.blocks)

    def embed_time(self, sinusoid_BFQ: Float[Array, "B F Q"]) -> Times:
        """`timestep_sinusoid` of each frame -> embeddings, in float32."""
        e = self.time_embed(sinusoid_BFQ)
        e0 = self.time_project(jax.nn.silu(e))
        return Times(e, e0.reshape(*e.shape[:2], 6, self.config.width))

    def embed_noisy(self, latent_BFHWC: Array, pose_BFHWC: Array | None) -> Float[Array, "B T D"]:
        """Noisy latents and pose latents (None: "no pose", zeros) -> tokens."""
        x = self.patch_embed(latent_BFHWC)
        if self.config.use_pose:
            # Without a pose the reference feeds zeros, which leaves the bias.
            x = x + (self.pose_embed.bias[...] if pose_BFHWC is None else self.pose_embed(pose_BFHWC))
        elif pose_BFHWC is not None:
            raise ValueError("this model was built without a pose encoder (use_pose=False)")
        return x + self.cond_mask[...][NOISY]

    def embed_reference(self, ref_B1HWC: Array) -> Float[Array, "B T D"]:
        return self.patch_embed(ref_B1HWC) + self.cond_mask[...][REFERENCE]

    def embed_motion(self, motion_BFHWC: Array, *, drop: int = 0, add_last_motion: int = 2) -> Array:
        """Packed motion tokens; the first `drop` are blanked, though not their mask embedding."""
        tokens = self.motion_packer(motion_BFHWC, add_last_motion)
        if drop:
            tokens = tokens.at[:, :drop].set(0)
        return tokens + self.cond_mask[...][MOTION]


def timestep_sinusoid(t_BF: Float[np.ndarray, "B F"] | Array, freq_dim: int) -> Float[Any, "B F Q"]:
    """[cos | sin] features of timesteps in 0..1000.

    NumPy input is computed in float64 and returned as float32, as the reference does; traced values are
    computed in float32 (angles up to 1000 rad, error about 3e-5).
    """
    xp: Any = np if isinstance(t_BF, np.ndarray) else jnp
    angle: Any
    frequency = 10_000.0 ** (-np.arange(freq_dim // 2, dtype=np.float64) / (freq_dim // 2))
    if xp is np:
        angle = np.asarray(t_BF, np.float64)[..., None] * frequency
    else:
        angle = t_BF.astype(jnp.float32)[..., None] * frequency.astype(np.float32)
    return xp.concatenate([xp.cos(angle), xp.sin(angle)], axis=-1).astype(np.float32)


def with_condition_row(model: CausalDiT, times: Times) -> Times:
    """Append the t = 0 row that reference and motion tokens are modulated by."""
    batch = times.e.shape[0]
    zero = model.embed_time(jnp.asarray(timestep_sinusoid(np.zeros((1, 1)), model.config.freq_dim)))
    rows = (jnp.broadcast_to(row, (batch, *row.shape[1:])) for row in zero)
    return Times(*(jnp.concatenate(pair, axis=1) for pair in zip(times, rows, strict=True)))


def with_remat(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A layer that recomputes what `remat` says in the backward pass."""
    if remat == "none":
        return layer
    # Products of weights are dear and their results small; those of attention grow with the square.
    keep = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[remat]
    return jax.checkpoint(layer, policy=keep)


def run_layers(
    model: CausalDiT,
    x_BTD: Float[Array, "B T D"],
    e0_BR6D: Float[Array, "B R 6 D"],
    text_LBSNH: KV,
    sequence: Sequence,
    attend: Callable[..., tuple[Array, Any, Any]],
    state: Any = None,
    *,
    per_layer: Any = None,
    audio: AudioTokens | None = None,
    actor_mask_BPFHW: Array | None = None,
    remat: Remat = "none",
    unroll: bool = False,
) -> tuple[Float[Array, "B T D"], Any, Any]:
    """All blocks and injections -> (tokens, final state, stacked per-layer outputs).

    `attend(layer, q, kv, state, per_layer[layer]) -> (y, state, output)` is the self-attention; `state`
    is carried from layer to layer (the cache), `per_layer` has a leading layer axis.
    The loop is `lax.scan` over the stacked blocks; `unroll` is the same as a Python loop: slower to
    compile, and free of per-layer weight slices where XLA would copy them.
    `remat`: what the backward pass recomputes of a layer: "none", "full" (all but its input), or "dots"
    (all but the results of linear layers).
    """
    config = model.config
    slots = np.full(config.layers, -1, np.int32)
    slots[list(config.inject_layers)] = np.arange(len(config.inject_layers))

    def inject(x: Array, slot: Any) -> Array:
        injector = gather_parts(jax.tree.map(lambda leaf: leaf[slot], model.injectors), "injectors.")
        noisy = injector(x[:, : sequence.noisy], audio, actor_mask_BPFHW)
        return jnp.concatenate([noisy, x[:, sequence.noisy :]], axis=1) if sequence.cond else noisy

    def layer(carry: tuple[Array, Any], inputs: tuple[Any, ...]) -> tuple[tuple[Array, Any], Any]:
        x, state = carry
        block, text, slot, index, extra = inputs
        block, x = gather_parts(block, "blocks."), split_samples(x)

        def self_attend(q: Array, kv: KV) -> tuple[Array, Any]:
            y, new_state, output = attend(index, q, kv, state, extra)
            return y, (new_state, output)

        x, (state, output) = block(x, e0_BR6D, text, self_attend, sequence)
        if audio is not None and config.inject_layers:
            if isinstance(slot, jax.Array):
                x = jax.lax.cond(slot >= 0, inject, lambda x, _: x, x, slot)
            elif slot >= 0:
                x = inject(x, slot)
        return (x, state), output

    if not unroll:
        inputs = (model.blocks, text_LBSNH, jnp.asarray(slots), jnp.arange(config.layers), per_layer)
        (x, state), outputs = jax.lax.scan(with_remat(layer, remat), (x_BTD, state), inputs)
        return x, state, outputs
    carry, collected = (x_BTD, state), []
    for index in range(config.layers):
        block, text, extra = jax.tree.map(lambda leaf: leaf[index], (model.blocks, text_LBSNH, per_layer))  # noqa: B023

        def this(carry: Any, parts: Any, index: int = index) -> Any:  # which layer it is stays a plain number
            block, text, extra = parts
            return layer(carry, (block, text, int(slots[index]), index, extra))

        carry, output = with_remat(this, remat)(carry, (block, text, extra))
        collected.append(output)
    return *carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)
