"""Attention and the ring of keys and values that streaming attends to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lavatar_jax.config import AttentionKind, DiTConfig
from lavatar_jax.errors import UserError
from lavatar_jax.models.layers import Linear, RMSNorm
from lavatar_jax.models.rope import Rope, apply_rope

CHUNK = 512  # queries of a group of "chunked"


class KV(NamedTuple):
    """Keys and values, [B, S, N, H] each; stacked over layers where a leading L is named."""

    k: Float[Array, "*L B S N H"]
    v: Float[Array, "*L B S N H"]


class Attention(nnx.Module):
    """Projections of multi-head attention with RMSNorm over all channels of q and k."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        zero_out: bool = False,
        implementation: AttentionKind = "xla",  # of `cross`
    ) -> None:
        self.q = Linear(width, width, rngs=rngs)
        self.k = Linear(width, width, rngs=rngs)
        self.v = Linear(width, width, rngs=rngs)
        self.o = Linear(width, width, rngs=rngs, zero=zero_out)
        self.norm_q = RMSNorm(width)
        self.norm_k = RMSNorm(width)
        self.heads = heads
        self.implementation = implementation

    def _split(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        return self._split(self.norm_q(self.q(x)))

    def keys_values(self, x: Float[Array, "B S D"]) -> KV:
        return KV(self._split(self.norm_k(self.k(x))), self._split(self.v(x)))

    def output(self, y: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        return self.o(y.reshape(*y.shape[:-2], -1))

    def cross(self, x: Float[Array, "B T D"], context: KV) -> Float[Array, "B T D"]:
        """Attention of `x` to all of `context`, without positions or mask."""
        y = dot_product_attention(self.queries(x), context.k, context.v, implementation=self.implementation)
        return self.output(y)


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    length: Int[Array, "*B"] | int | None = None,
    mask: Bool[Array, "T S"] | None = None,
    implementation: AttentionKind = "xla",
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v, softmax in float32.

    `length`: only the first `length` keys exist, for all rows or one number a row.
    `mask` [T, S]: True where attention is allowed; it becomes a materialised bias on GPU, so streaming uses
    `length`.
    `implementation="cudnn"` is the flash kernel of NVIDIA GPUs (bf16 or f16 only). Raises UserError for it on
    other devices. "auto" takes it for the calls that it can serve (`flash_serves`), "xla" for the others.
    "chunked" has logits of `CHUNK` queries in memory, and computes them anew for gradients.
    """
    if implementation == "auto":
        implementation = "cudnn" if flash_serves(q, mask) else "xla"
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            'attention "cudnn" needs an NVIDIA GPU; set dit.attention to "auto" in the model\'s config.json'
        )
    lengths = None if length is None else jnp.broadcast_to(jnp.asarray(length, jnp.int32), q.shape[:1])
    if q.dtype == jnp.float64:
        return _exact(q, k, v, lengths, mask)
    if implementation == "chunked":
        return _chunked(q, k, v, lengths, mask)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        key_value_seq_lengths=lengths,
        mask=None if mask is None else mask[None, None],
        implementation=implementation,
    )


def block_ranges(tokens: int, block: int) -> list[tuple[int, int]]:
    """First token and end of every block; the last one may be short."""
    return [(first, min(first + block, tokens)) for first in range(0, tokens, block)]


def block_causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    *,
    noisy: int,
    block: int,
    there: Int[Array, ""] | int,
    implementation: AttentionKind = "xla",
) -> Float[Array, "B T N H"]:
    """Attention of the sequence noisy | condition tokens as `dit_forward.block_causal_mask` has it, without
    what it masks: each block of `block` tokens attends by itself to all before it, itself, and conditions.

    Without a mask flash kernels can serve it, and half of the products are not computed. Only the first
    `there` condition tokens count; where none do they see each other, which nobody sees.
    """
    cond = k.shape[1] - noisy

    def attend(q: Array, k: Array, v: Array, keys: int, length: Array | int) -> Array:
        k_seen, v_seen = (jnp.concatenate([x[:, :keys], x[:, noisy:]], axis=1) for x in (k, v))
        known = isinstance(length, int) and length == keys + cond
        return dot_product_attention(
            q, k_seen, v_seen, length=None if known else length, implementation=implementation
        )

    if implementation == "chunked":  # or the keys of every block would be kept for its gradient
        attend = jax.checkpoint(attend, static_argnums=3)
    parts = [attend(q[:, first:stop], k, v, stop, stop + there) for first, stop in block_ranges(noisy, block)]
    if cond:
        among = there if isinstance(there, int) else jnp.where(there > 0, there, cond)
        parts.append(attend(q[:, noisy:], k, v, 0, among))
    return jnp.concatenate(parts, axis=1)


def flash_serves(q: Float[Array, "B T N H"], mask: Array | None = None, device: Any = None) -> bool:
    """Whether cuDNN's flash kernel can attend with `q` and `mask` on `device` (None: the default backend's).

    It needs an NVIDIA GPU from Ampere on, 16-bit numbers, and heads of a multiple of 8 channels, at most 128
    on all of these GPUs. A mask it could only take as a bias of [B, N, T, S], as large as the logits.
    """
    device = jax.local_devices()[0] if device is None else device
    major = str(getattr(device, "compute_capability", "")).split(".")[0]  # "9.0"; AMD's are like "gfx942"
    ampere = device.platform == "gpu" and major.isdigit() and int(major) >= 8
    head_dim = q.shape[-1]
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    return ampere and fits and mask is None


def _exact(q: Array, k: Array, v: Array, lengths: Array | None, mask: Array | None) -> Array:
    """In float64, for checks: the softmax of jax.nn is float32 whatever it is given."""
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(q.shape[-1])
    if lengths is not None:
        exists = jnp.arange(k.shape[1]) < lengths[:, None]
        logits = jnp.where(exists[:, None, None], logits, -jnp.inf)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(logits, axis=-1), v)


def _chunked(q: Array, k: Array, v: Array, lengths: Array | None, mask: Array | None) -> Array:
    batch, queries = q.shape[:2]
    groups = -(-queries // CHUNK)
    fill = groups * CHUNK - queries  # surplus queries see everything, and are cut off

    def split(x: Array, axis: int, value: float | bool) -> Array:
        widths = [(0, fill if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=value)
        x = x.reshape(*x.shape[:axis], groups, CHUNK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    @jax.checkpoint
    def attend(group: tuple[Array, Array | None]) -> Array:
        q, mask = group
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, mask=None if mask is None else mask[None, None]
        )

    y = jax.lax.map(attend, (split(q, 1, 0.0), None if mask is None else split(mask, 0, True)))
    return jnp.moveaxis(y, 0, 1).reshape(batch, groups * CHUNK, *q.shape[2:])[:, :queries]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
    """Keys and values that one denoising step attends to, for all layers.

    `k`, `v` [L, B, S, N, H] have slots [sink | ring]: first C sink tokens, then the ring of the latest
    blocks. Ring keys are roped at their absolute frame. The sink's keys roll, so they are kept without
    rope in `sink_k` [L, B, C, N, H] and their roped copy in `k[:, :, :C]` is rewritten for each block.
    Valid slots are always a prefix, so one length describes the mask, and slot order does not matter.
    """

    k: Float[Array, "L B S N H"]
    v: Float[Array, "L B S N H"]
    sink_k: Float[Array, "L B C N H"]

    @property
    def sink_tokens(self) -> int:
        return self.sink_k.shape[2]

    @property
    def ring_tokens(self) -> int:
        return self.k.shape[2] - self.sink_tokens


def init_cache(
    config: DiTConfig, batch: int, sink_tokens: int, ring_tokens: int, dtype: jnp.dtype = jnp.float32
) -> RingCache:
    """An empty ring for `ring_tokens` (a whole number of blocks) behind `sink_tokens` of sink."""
    shape = (config.layers, batch, sink_tokens + ring_tokens, config.heads, config.head_dim)
    sink = (config.layers, batch, sink_tokens, config.heads, config.head_dim)
    return RingCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(sink, dtype))


class RingSlot(NamedTuple):
    """Where a block goes and what it sees; computed by the host from its absolute index.

    `offset`: first ring token the block overwrites. `end`: number of ring tokens valid afterwards. Both are
    one number, or one for every row where rows are at different blocks (sessions that share a pipeline).
    `start`: first ring token attended (0 but for the reference's `local_attn_size`).
    """

    offset: Int[Array, "*B"] | int
    end: Int[Array, "*B"] | int
    start: Int[Array, ""] | int | None = None


def ring_slot(block: int, block_tokens: int, ring_tokens: int, local_tokens: int | None = None) -> RingSlot:
    """The slot of block number `block` (0, 1, 2, ... without end) of the video.

    `local_tokens`: attend only to that many latest tokens (the reference's `local_attn_size`); once the
    ring has wrapped, slots are no longer in order and the reference refuses: ValueError.
    """
    if ring_tokens % block_tokens:
        raise ValueError(f"ring of {ring_tokens} tokens is not a whole number of blocks of {block_tokens}")
    wrapped = (block + 1) * block_tokens > ring_tokens
    offset = block % (ring_tokens // block_tokens) * block_tokens
    end = ring_tokens if wrapped else offset + block_tokens
    if local_tokens is None:
        return RingSlot(offset, end)
    if wrapped:
        raise ValueError("local attention is only defined until the ring wraps")
    return RingSlot(offset, end, max(0, end - local_tokens))


def ring_attention(
    layer: Int[Array, ""] | int,
    q: Float[Array, "B T N H"],
    kv: KV,
    ring: KV,
    sink_k: Float[Array, "B C N H"],
    slot: RingSlot,
    rope: Rope,
    sink_rope: Rope,
    *,
    implementation: AttentionKind = "xla",
) -> tuple[Float[Array, "B T N H"], KV]:
    """A block's attention in one layer of the cache -> (values, `ring` with the block in it).

    `q`, `kv` [B, T, N, H] and `sink_k` come without rope; `ring` is the cache's `k` and `v` of all layers.
    The block is written first, and then attends to the sink and to what `slot` names of the ring, itself
    included.
    """
    n_sink, slots = sink_k.shape[1], ring.k.shape[2]

    def write(buffer: Array, new: Array, offset: Any) -> Array:
        new = new[None].astype(buffer.dtype)
        if jnp.ndim(offset) == 0:
            return jax.lax.dynamic_update_slice(buffer, new, (layer, 0, offset, 0, 0))
        for row in range(new.shape[1]):  # one update in place a row; a scatter would copy the ring
            here = (layer, row, offset[row], 0, 0)
            buffer = jax.lax.dynamic_update_slice(buffer, new[:, row : row + 1], here)
        return buffer

    k = write(ring.k, apply_rope(sink_k, sink_rope), 0)
    k = write(k, apply_rope(kv.k, rope), n_sink + slot.offset)
    v = write(ring.v, kv.v, n_sink + slot.offset)
    k_layer, v_layer = (jax.lax.dynamic_index_in_dim(b, layer, keepdims=False) for b in (k, v))
    mask = None
    if slot.start is not None:
        place = jnp.arange(slots)
        attended = (place < n_sink) | (place >= n_sink + slot.start)
        mask = jnp.broadcast_to(attended, (q.shape[1], slots))
    y = dot_product_attention(
        apply_rope(q, rope),
        k_layer,
        v_layer,
        length=n_sink + slot.end,
        mask=mask,
        implementation=implementation,
    )
    return y, KV(k, v)
