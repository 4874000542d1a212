"""PyTorch keys of the Wan 2.1 and Wan 2.2 VAEs -> our paths."""

from __future__ import annotations

from lavatar_jax.checkpoints.convert import Rule

_NUMBER = r"(\d+)"
_LEVELS = r"layers.\1.layers.\2"


def _layer(key: str, path: str, transform: str) -> list[Rule]:
    return [Rule(rf"{key}\.weight", f"{path}.weight", transform), Rule(rf"{key}\.bias", f"{path}.bias")]


def _residual(key: str, path: str) -> list[Rule]:
    """The reference numbers a block's parts: norm 0, convolution 2, norm 3, convolution 6."""
    return [
        Rule(rf"{key}\.residual\.0\.gamma", f"{path}.inner.norm.gamma", "channels3d"),
        *_layer(rf"{key}\.residual\.2", f"{path}.inner.conv", "conv3d"),
        Rule(rf"{key}\.residual\.3\.gamma", f"{path}.outer.norm.gamma", "channels3d"),
        *_layer(rf"{key}\.residual\.6", f"{path}.outer.conv", "conv3d"),
        *_layer(rf"{key}\.shortcut", f"{path}.shortcut", "pointwise3d"),
    ]


def _resample(key: str, path: str) -> list[Rule]:
    return [
        *_layer(rf"{key}\.resample\.1", f"{path}.conv", "conv2d"),
        *_layer(rf"{key}\.time_conv", f"{path}.time_conv", "conv3d"),
    ]


def _attention(key: str, path: str) -> list[Rule]:
    return [
        Rule(rf"{key}\.norm\.gamma", f"{path}.norm.gamma", "channels2d"),
        *_layer(rf"{key}\.to_qkv", f"{path}.qkv", "pointwise2d"),
        *_layer(rf"{key}\.proj", f"{path}.out", "pointwise2d"),
    ]


def _coder(coder: str, body_key: str, body_path: str) -> list[Rule]:
    """An encoder or decoder; `body_*` leads to the residual blocks and resamplers between conv1 and head."""
    middle_key, middle_path = rf"{coder}\.middle\.{_NUMBER}", rf"{coder}.middle.\1"
    return [
        *_layer(rf"{coder}\.conv1", f"{coder}.conv_in", "conv3d"),
        *_residual(body_key, body_path),
        *_resample(body_key, body_path),
        *_residual(middle_key, middle_path),
        *_attention(middle_key, middle_path),
        Rule(rf"{coder}\.head\.0\.gamma", f"{coder}.head.norm.gamma", "channels3d"),
        *_layer(rf"{coder}\.head\.2", f"{coder}.head.conv", "conv3d"),
    ]


_BETWEEN = [*_layer("conv1", "quant", "pointwise3d"), *_layer("conv2", "post_quant", "pointwise3d")]

WAN21_RULES: list[Rule] = [
    *_coder("encoder", rf"encoder\.downsamples\.{_NUMBER}", r"encoder.layers.\1"),
    *_BETWEEN,
    *_coder("decoder", rf"decoder\.upsamples\.{_NUMBER}", r"decoder.layers.\1"),
]

WAN22_RULES: list[Rule] = [
    *_coder("encoder", rf"encoder\.downsamples\.{_NUMBER}\.downsamples\.{_NUMBER}", f"encoder.{_LEVELS}"),
    *_BETWEEN,
    *_coder("decoder", rf"decoder\.upsamples\.{_NUMBER}\.upsamples\.{_NUMBER}", f"decoder.{_LEVELS}"),
]

VAE_RULES: dict[str, list[Rule]] = {"wan21": WAN21_RULES, "wan22": WAN22_RULES}  # by VAEConfig.kind
