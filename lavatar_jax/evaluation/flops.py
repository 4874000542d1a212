"""Arithmetic of the model: counted from a traced program, or worked out from a configuration.

Conventions of the reference's table (reference behaviour 13): a multiply-add is 2 FLOP; only matrix products
and convolutions count; 1 TFLOP = 1e12.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from lavatar_jax.config import DiTConfig
from lavatar_jax.models.attention import block_ranges


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOP of one call, from the trace; `args` may be abstract (jax.ShapeDtypeStruct). Nothing is computed.

    A scan counts as often as it runs. Of a `cond` the dearest branch counts, so programs that skip work in
    some iterations are overestimated: trace them unrolled. Raises ValueError for `while`, whose number of
    rounds is unknown.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [_count(sub) for sub in _inner_programs(equation.params)]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * result.size * math.prod(left.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, result = equation.invars[1].aval, equation.outvars[0].aval
            out_axis = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * result.size * kernel.size // kernel.shape[out_axis]
        elif name == "cond":
            total += max(inner)
        elif name == "while" and any(inner):
            raise ValueError("cannot count the FLOP of a while loop: its number of rounds is unknown")
        else:
            total += sum(inner) * (equation.params["length"] if name == "scan" else 1)
    return total


def _inner_programs(params: dict[str, Any]) -> list[Any]:
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else [value])]
    closed = [getattr(value, "jaxpr", value) for value in values]
    return [program for program in closed if hasattr(program, "eqns")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamShape:
    """Sizes of one streaming forward with a full ring. `height`, `width`: of the latent."""

    config: DiTConfig
    height: int
    width: int
    ring_blocks: int = 4
    motion: bool = True  # packed motion frames are part of the sink

    @property
    def tokens_per_frame(self) -> int:
        patch = self.config.patch
        return (self.height // patch) * (self.width // patch)

    @property
    def queries(self) -> int:
        """Tokens of a block."""
        return self.config.block_frames * self.tokens_per_frame

    @property
    def sink(self) -> int:
        """Reference and motion tokens: the newest motion frame at full, one at half, four at quarter size."""
        if not (self.motion and self.config.use_motion):
            return self.tokens_per_frame
        half, quarter = (
            (self.height // (n * self.config.patch)) * (self.width // (n * self.config.patch)) for n in (2, 4)
        )
        return 2 * self.tokens_per_frame + half + 4 * quarter

    @property
    def keys(self) -> int:
        """Tokens that each query attends to."""
        return self.ring_blocks * self.queries + self.sink

    def flops(self, *, text_cached: bool = True, audio_copies: int = 5) -> dict[str, float]:
        """FLOP of each part of one forward.

        `text_cached=False`: keys, values and embeddings of prompt and timestep are computed anew, as the
        reference does. `audio_copies`: of the first feature frame, which the audio encoder sees in front
        (the reference: 73). With False and 73 the parts are those of the reference's table.
        """
        c = self.config
        d, t, s, layers = c.width, self.queries, self.keys, c.layers
        text = 0 if text_cached else c.text_len
        audio_tokens = c.block_frames * (c.audio_tokens + 1)
        injector = 4 * t * d**2 + 4 * audio_tokens * d**2  # q, o of the tokens; k, v of the audio
        injector += 4 * t * (c.audio_tokens + 1) * d + 4 * c.block_frames * d**2  # attention; adaptive norm
        patch = c.patch**2 * c.latent_channels
        embeddings = 2 * t * patch * d * (2 + c.use_pose)
        if not text_cached:
            embeddings += 2 * c.text_len * (c.text_dim * d + d**2)
            embeddings += 2 * c.block_frames * (c.freq_dim * d + 7 * d**2)
        return {
            "self-attention, linear": layers * 8 * t * d**2,
            "self-attention": layers * 4 * t * s * d,
            "cross-attention, linear": layers * 4 * (t + text) * d**2,
            "cross-attention": layers * 4 * t * c.text_len * d,
            "feed-forward": layers * 4 * t * d * c.ffn_width,
            "audio injectors": len(c.inject_layers) * injector,
            "audio encoder": _audio_encoder(c, audio_copies),
            "embeddings and head": embeddings,
        }

    def ring_bytes(self, bytes_per_value: int = 2) -> int:
        """Keys and values of one denoising step, all layers: ring and sink, and the sink's keys as they are
        before they roll."""
        return self.config.layers * self.config.width * bytes_per_value * (2 * self.keys + self.sink)

    def text_bytes(self, bytes_per_value: int = 2) -> int:
        """Keys and values of the prompt, all layers."""
        return 2 * self.config.layers * self.config.text_len * self.config.width * bytes_per_value

    def packet_bytes(self, steps: int) -> int:
        """What one block hands on: latent, speech features, a pose, and rope tables, all float32."""
        c = self.config
        latent = c.block_frames * self.height * self.width * c.latent_channels
        audio = c.audio_layers * c.audio_dim * 4 * c.block_frames
        tables = (self.queries + steps * self.sink) * c.head_dim
        return 4 * (latent * (1 + c.use_pose) + audio + tables)


def clip_flops(
    config: DiTConfig, frames: int, height: int, width: int, *, motion: bool = False, causal: bool = True
) -> float:
    """FLOP of one forward of a whole clip with its reference, as in training.

    `frames`, `height`, `width`: of the latent. `causal`: a block attends to those before it, itself and the
    conditions, else every token to all.
    """
    c, d = config, config.width
    shape = StreamShape(config=config, height=height, width=width, motion=motion)
    noisy = frames * shape.tokens_per_frame
    tokens, text, heard = noisy + shape.sink, c.text_len, frames * (c.audio_tokens + 1)
    pairs = tokens * tokens
    if causal:
        blocks = block_ranges(noisy, shape.queries)
        pairs = shape.sink**2 + sum((stop - first) * (stop + shape.sink) for first, stop in blocks)
    layer = 12 * tokens * d**2 + 4 * text * d**2 + 4 * d * (pairs + tokens * (text + c.ffn_width))
    injector = 4 * noisy * d**2 + 4 * heard * d**2 + 4 * noisy * (c.audio_tokens + 1) * d
    injector += 4 * frames * d**2
    outside = 2 * (2 * noisy + shape.sink) * c.patch**2 * c.latent_channels * d
    outside += 2 * text * (c.text_dim * d + d**2) + 2 * (frames + 1) * (c.freq_dim * d + 7 * d**2)
    return c.layers * layer + len(c.inject_layers) * injector + outside


def step_flops(forward: float, *, lora: bool) -> float:
    """FLOP of a training step on what costs `forward` FLOP: the backward pass takes two products for each one
    (by input and by weight), or one where the weight is frozen. Recomputation does not count."""
    return forward * (2 if lora else 3)


def _audio_encoder(config: DiTConfig, copies: int) -> float:
    """Convolutions over a block's features and `copies` of the first: local streams and a global one."""
    d, time = config.width, copies + 4 * config.block_frames
    half, quarter = (time + 1) // 2, (time + 3) // 4
    streams = config.audio_tokens + 1
    first = time * 3 * config.audio_dim * streams * d // 4
    rest = streams * (half * 3 * (d // 4) * (d // 2) + quarter * 3 * (d // 2) * d)
    return 2.0 * (first + rest + quarter * d**2)


def layer_parameters(config: DiTConfig) -> dict[str, int]:
    """Weights of the large matrices, those that fp8 halves: `blocks` (what "14B" counts) and `injectors`."""
    d = config.width
    return {
        "blocks": config.layers * (8 * d**2 + 2 * d * config.ffn_width),
        "injectors": len(config.inject_layers) * 6 * d**2,
    }


def other_parameters(config: DiTConfig) -> int:
    """Weights that stay in 16 bits: embeddings of text and time, audio encoder, motion packer."""
    d, a = config.width, config.audio_dim
    text = config.text_dim * d + d**2
    time = config.freq_dim * d + 7 * d**2
    streams = 3 * (a * (config.audio_tokens + 1) * d // 4 + d**2 // 8 + d**2 // 2) + d**2
    packer = config.use_motion * d * config.latent_channels * config.patch**2 * (1 + 8 + 64)
    return text + time + streams + packer
