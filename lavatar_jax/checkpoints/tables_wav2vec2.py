"""Keys of transformers' Wav2Vec2ForCTC (wav2vec2-large-xlsr-53-english) -> our paths."""

from __future__ import annotations

from lavatar_jax.checkpoints.convert import Rule
from lavatar_jax.checkpoints.transforms import flatten_from

_BODY = r"wav2vec2\."
_CONV = _BODY + r"feature_extractor\.conv_layers\.(\d+)\."
_POSITION = _BODY + r"encoder\.pos_conv_embed\.conv\."
_LAYER = _BODY + r"encoder\.layers\.(?P<layer>\d+)\."
_LENGTH = flatten_from(1, 1, -1)


def _affine(key: str, path: str, transform: str = "identity") -> list[Rule]:
    return [Rule(rf"{key}\.weight", f"{path}.weight", transform), Rule(rf"{key}\.bias", f"{path}.bias")]


WAV2VEC2_RULES: list[Rule] = [
    Rule(_BODY + "masked_spec_embed", "mask_vector"),
    *_affine(_CONV + "conv", r"convs.\1", "conv1d"),
    *_affine(_CONV + "layer_norm", r"convs.\1.norm"),
    *_affine(_BODY + r"feature_projection\.layer_norm", "project_norm"),
    *_affine(_BODY + r"feature_projection\.projection", "project", "linear"),
    # Weight norm, as published and as newer versions of torch name it.
    Rule(_POSITION + "weight_g", "position.length", _LENGTH),
    Rule(_POSITION + "weight_v", "position.direction", "conv1d"),
    Rule(_POSITION + r"parametrizations\.weight\.original0", "position.length", _LENGTH),
    Rule(_POSITION + r"parametrizations\.weight\.original1", "position.direction", "conv1d"),
    Rule(_POSITION + "bias", "position.bias"),
    *_affine(_LAYER + r"attention\.q_proj", "layers.q", "linear"),
    *_affine(_LAYER + r"attention\.k_proj", "layers.k", "linear"),
    *_affine(_LAYER + r"attention\.v_proj", "layers.v", "linear"),
    *_affine(_LAYER + r"attention\.out_proj", "layers.o", "linear"),
    *_affine(_LAYER + "layer_norm", "layers.attn_norm"),
    *_affine(_LAYER + r"feed_forward\.intermediate_dense", "layers.ffn.inner", "linear"),
    *_affine(_LAYER + r"feed_forward\.output_dense", "layers.ffn.outer", "linear"),
    *_affine(_LAYER + "final_layer_norm", "layers.ffn_norm"),
    *_affine(_BODY + r"encoder\.layer_norm", "norm"),
    *_affine("lm_head", "lm_head", "linear"),
]
