"""wav2vec2 with layer-normed convolutions and pre-norm layers (large-xlsr-53): speech to features.

Behaviour as of transformers' Wav2Vec2ForCTC, whose hidden states the reference feeds to the transformer.
The CTC head and the training-time mask vector are carried along unused, so that a checkpoint goes back whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lavatar_jax.errors import UserError
from lavatar_jax.models.attention import dot_product_attention
from lavatar_jax.models.layers import MLP, Linear, layer_norm

# What transformers takes for a setting that config.json leaves out.
_HUGGINGFACE_DEFAULTS: dict[str, Any] = {
    "model_type": "wav2vec2",
    "architectures": ["Wav2Vec2ForCTC"],
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "vocab_size": 32,
    "mask_time_prob": 0.05,
    "mask_feature_prob": 0.0,
    "layer_norm_eps": 1e-5,
    "do_stable_layer_norm": False,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "hidden_act": "gelu",
    "conv_bias": False,
    "add_adapter": False,
    "adapter_attn_dim": None,
}
# The one architecture that we know; everything else must be refused, not computed wrongly.
_REQUIRED: dict[str, Any] = {
    "model_type": "wav2vec2",
    "architectures": ["Wav2Vec2ForCTC"],
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "feat_extract_activation": "gelu",
    "hidden_act": "gelu",
    "conv_bias": True,
    "add_adapter": False,
    "adapter_attn_dim": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wav2Vec2Config:
    """Sizes of the network. Defaults are the published wav2vec2-large-xlsr-53."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    ffn_width: int = 4096
    conv_width: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    position_kernel: int = 128
    position_groups: int = 16
    vocabulary: int = 33
    mask_vector: bool = True  # only a network trained with masked frames has one
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not len(self.conv_width) == len(self.conv_kernel) == len(self.conv_stride) > 0:
            raise ValueError("conv_width, conv_kernel and conv_stride must have one entry per convolution")
        for name, parts in (("heads", self.heads), ("position_groups", self.position_groups)):
            if parts < 1 or self.width % parts:
                raise ValueError(f"width {self.width} is not divisible by {name} {parts}")

    @property
    def stride(self) -> int:
        """Samples from one frame to the next (320: 50 frames a second)."""
        return math.prod(self.conv_stride)

    @property
    def window(self) -> int:
        """Samples that the convolutions see for one frame (400: 25 ms)."""
        window, stride = 1, 1
        for kernel, step in zip(self.conv_kernel, self.conv_stride, strict=True):
            window, stride = window + (kernel - 1) * stride, stride * step
        return window

    def frames(self, samples: int) -> int:
        """Number of whole frames in that many samples."""
        return max(0, (samples - self.window) // self.stride + 1)

    @classmethod
    def from_huggingface(cls, values: Mapping[str, Any], where: str = "config.json") -> Wav2Vec2Config:
        """Settings of a transformers `config.json`; `where` names it in messages.

        Raises UserError for another architecture, and for settings that are no sizes.
        """

        def refuse(problem: str) -> NoReturn:
            raise UserError(
                f"{where}: {problem}; only models like wav2vec2-large-xlsr-53-english can be loaded"
            )

        values = {**_HUGGINGFACE_DEFAULTS, **values}
        for name, required in _REQUIRED.items():
            if values[name] != required:
                refuse(f"{name} is {values[name]!r}, this program needs {required!r}")

        def size(value: Any, name: str) -> int:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                refuse(f"{name} has {value!r} where a positive whole number should be")
            return value

        def sizes(name: str) -> tuple[int, ...]:
            entries = values[name]
            if not isinstance(entries, list | tuple):
                refuse(f"{name} is {entries!r}, not a list of sizes")
            return tuple(size(entry, name) for entry in entries)

        if not isinstance(values["layer_norm_eps"], float):
            refuse(f"layer_norm_eps is {values['layer_norm_eps']!r}, not a number")
        try:
            return cls(
                layers=size(values["num_hidden_layers"], "num_hidden_layers"),
                width=size(values["hidden_size"], "hidden_size"),
                heads=size(values["num_attention_heads"], "num_attention_heads"),
                ffn_width=size(values["intermediate_size"], "intermediate_size"),
                conv_width=sizes("conv_dim"),
                conv_kernel=sizes("conv_kernel"),
                conv_stride=sizes("conv_stride"),
                position_kernel=size(values["num_conv_pos_embeddings"], "num_conv_pos_embeddings"),
                position_groups=size(
                    values["num_conv_pos_embedding_groups"], "num_conv_pos_embedding_groups"
                ),
                vocabulary=size(values["vocab_size"], "vocab_size"),
                mask_vector=bool(values["mask_time_prob"] or values["mask_feature_prob"]),
                eps=values["layer_norm_eps"],
            )
        except ValueError as error:
            refuse(str(error))


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


class Norm(nnx.Module):
    """Affine layer norm over channels with the model's epsilon, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return (layer_norm(x, self.eps) * self.weight[...] + self.bias[...]).astype(x.dtype)


class ConvLayer(nnx.Module):
    """Strided convolution over time without padding, layer norm over channels, GELU."""

    def __init__(
        self, n_in: int, n_out: int, kernel: int, stride: int, eps: float, *, rngs: nnx.Rngs
    ) -> None:
        noise = jax.random.normal(rngs.params(), (kernel, n_in, n_out))
        self.weight = nnx.Param(noise / math.sqrt(kernel * n_in))
        self.bias = nnx.Param(jnp.zeros(n_out))
        self.norm = Norm(n_out, eps)
        self.stride = stride

    def __call__(self, x_BTC: Float[Array, "B T I"]) -> Float[Array, "B t O"]:
        y = jax.lax.conv_general_dilated(
            x_BTC, self.weight[...], (self.stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return _gelu(self.norm(y + self.bias[...]))


class PositionConv(nnx.Module):
    """Grouped convolution whose output, added to the frames, tells the layers what is near.

    Its weight has a norm of its own for each tap: weight = length * direction / |direction|.
    """

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs) -> None:
        taps, groups = config.position_kernel, config.position_groups
        noise = jax.random.normal(rngs.params(), (taps, config.width // groups, config.width))
        self.direction = nnx.Param(noise)
        # So that the result of all taps together has unit variance.
        self.length = nnx.Param(jnp.full(taps, math.sqrt(config.width / taps)))
        self.bias = nnx.Param(jnp.zeros(config.width))
        self.groups = groups

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        direction = self.direction[...]
        norm = jnp.sqrt(jnp.sum(jnp.square(direction), axis=(1, 2), keepdims=True))
        weight = direction * (self.length[...][:, None, None] / norm)
        taps = weight.shape[0]
        y = jax.lax.conv_general_dilated(
            x_BTD,
            weight,
            (1,),
            [(taps // 2, (taps - 1) // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return _gelu(y + self.bias[...])


class EncoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); every frame sees every valid frame."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.attn_norm = Norm(width, config.eps)
        self.q, self.k, self.v, self.o = (Linear(width, width, rngs=rngs) for _ in range(4))
        self.ffn_norm = Norm(width, config.eps)
        self.ffn = MLP(width, config.ffn_width, width, _gelu, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x_BTD: Float[Array, "B T D"], valid_T: Bool[Array, " T"] | None) -> Array:
        h = self.attn_norm(x_BTD)
        q, k, v = (project(h).reshape(*h.shape[:2], self.heads, -1) for project in (self.q, self.k, self.v))
        x = x_BTD + self.o(_attend(q, k, v, valid_T).reshape(h.shape))
        return x + self.ffn(self.ffn_norm(x))


def _attend(q: Array, k: Array, v: Array, valid_T: Array | None, piece: int = 512) -> Array:
    """Attention [B, T, N, H] in pieces of queries, so that memory grows with T and not with its square."""
    mask = None if valid_T is None else valid_T[None]
    batch, count, heads, size = q.shape
    if count <= 2 * piece:
        return dot_product_attention(q, k, v, mask=mask)
    q = jnp.pad(q, [(0, 0), (0, -count % piece), (0, 0), (0, 0)])
    pieces = jnp.moveaxis(q.reshape(batch, -1, piece, heads, size), 1, 0)
    y = jax.lax.map(lambda some: dot_product_attention(some, k, v, mask=mask), pieces)
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, heads, size)[:, :count]


class Wav2Vec2(nnx.Module):
    """All parameters of Wav2Vec2ForCTC. The encoder's layers are stacked along a leading axis."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        widths = (1, *config.conv_width)
        self.convs = nnx.List(
            ConvLayer(*sizes, config.eps, rngs=rngs)
            for sizes in zip(widths, widths[1:], config.conv_kernel, config.conv_stride, strict=False)
        )
        self.project_norm = Norm(widths[-1], config.eps)
        self.project = Linear(widths[-1], config.width, rngs=rngs)
        self.position = PositionConv(config, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.layers)
        self.layers = jax.vmap(lambda key: EncoderLayer(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = Norm(config.width, config.eps)
        if config.mask_vector:
            self.mask_vector = nnx.Param(jax.random.uniform(rngs.params(), (config.width,)))
        self.lm_head = Linear(config.width, config.vocabulary, rngs=rngs)

    def __call__(
        self, samples_Bn: Float[Array, "B n"], valid_T: Bool[Array, " T"] | None = None
    ) -> Float[Array, "B L1 T D"]:
        """Samples of 16 kHz, normalised to mean 0 and variance 1 -> `layers + 1` hidden states.

        T = config.frames(n), 50 a second; frame i sees the samples from 320 i to 320 i + 400. State 0 is the
        input of the first layer, state l the output of layer l, the last one after the final norm.
        `valid_T` False: the frame does not exist (it lies outside the recording); the others come out as if
        the array ended there.
        """
        x = samples_Bn.astype(self.project.weight[...].dtype)[..., None]
        for conv in self.convs:
            x = conv(x)
        x = self.project(self.project_norm(x))
        if valid_T is not None:
            x = jnp.where(valid_T[:, None], x, 0)
        x = x + self.position(x)

        def layer(x: Array, layer: EncoderLayer) -> tuple[Array, Array]:
            return layer(x, valid_T), x

        x, states = jax.lax.scan(layer, x, self.layers)
        return jnp.concatenate([jnp.moveaxis(states, 0, 1), self.norm(x)[:, None]], axis=1)
