"""PyTorch keys of the S2V transformer (Wan2.2-S2V-14B; the causal model has the same) -> our paths."""

from __future__ import annotations

from lavatar_jax.checkpoints.convert import Rule
from lavatar_jax.checkpoints.transforms import flatten_from

_LAYER = r"blocks\.(?P<layer>\d+)\."
_INJECTOR = r"audio_injector\.injector\.(?P<layer>\d+)\."


def _linear(key: str, path: str) -> list[Rule]:
    return [
        Rule(rf"{key}\.weight", f"{path}.weight", "linear"),
        Rule(rf"{key}\.bias", f"{path}.bias"),
    ]


def _conv(key: str, path: str, transform: str) -> list[Rule]:
    return [Rule(rf"{key}\.weight", f"{path}.weight", transform), Rule(rf"{key}\.bias", f"{path}.bias")]


def _attention(key: str, path: str) -> list[Rule]:
    rules = [rule for name in "qkvo" for rule in _linear(rf"{key}{name}", f"{path}.{name}")]
    return rules + [Rule(rf"{key}norm_{name}\.weight", f"{path}.norm_{name}.weight") for name in "qk"]


DIT_RULES: list[Rule] = [
    *_conv("patch_embedding", "patch_embed", "conv3d"),
    *_conv("cond_encoder", "pose_embed", "conv3d"),
    *_conv(r"frame_packer\.proj", "motion_packer.near", "conv3d"),
    *_conv(r"frame_packer\.proj_2x", "motion_packer.middle", "conv3d"),
    *_conv(r"frame_packer\.proj_4x", "motion_packer.far", "conv3d"),
    Rule(r"trainable_cond_mask\.weight", "cond_mask"),
    *_linear(r"text_embedding\.0", "text_embed.inner"),
    *_linear(r"text_embedding\.2", "text_embed.outer"),
    *_linear(r"time_embedding\.0", "time_embed.inner"),
    *_linear(r"time_embedding\.2", "time_embed.outer"),
    *_linear(r"time_projection\.1", "time_project"),
    Rule(_LAYER + "modulation", "blocks.modulation", "drop_first"),
    *_attention(_LAYER + r"self_attn\.", "blocks.self_attn"),
    *_attention(_LAYER + r"cross_attn\.", "blocks.cross_attn"),
    Rule(_LAYER + r"norm3\.weight", "blocks.norm3.weight"),
    Rule(_LAYER + r"norm3\.bias", "blocks.norm3.bias"),
    *_linear(_LAYER + r"ffn\.0", "blocks.ffn.inner"),
    *_linear(_LAYER + r"ffn\.2", "blocks.ffn.outer"),
    Rule(r"head\.modulation", "head.modulation", "drop_first"),
    *_linear(r"head\.head", "head.linear"),
    *_linear(r"head\.gain", "head.gain"),  # of `input_skip`: published models have none
    Rule(r"casual_audio_encoder\.weights", "audio_encoder.layer_weights", flatten_from(1, -1, 1, 1)),
    Rule(
        r"casual_audio_encoder\.encoder\.padding_tokens",
        "audio_encoder.padding_token",
        flatten_from(1, 1, 1, -1),
    ),
    *_conv(r"casual_audio_encoder\.encoder\.conv1_local\.conv", "audio_encoder.local_in", "conv1d"),
    *_conv(r"casual_audio_encoder\.encoder\.conv1_global\.conv", "audio_encoder.global_in", "conv1d"),
    *_conv(r"casual_audio_encoder\.encoder\.conv2\.conv", "audio_encoder.conv2", "conv1d"),
    *_conv(r"casual_audio_encoder\.encoder\.conv3\.conv", "audio_encoder.conv3", "conv1d"),
    *_linear(r"casual_audio_encoder\.encoder\.final_linear", "audio_encoder.global_out"),
    *_attention(_INJECTOR, "injectors.attention"),
    *_linear(r"audio_injector\.injector_adain_layers\.(?P<layer>\d+)\.linear", "injectors.adain"),
]
