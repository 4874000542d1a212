"""PyTorch keys of the umT5 encoder -> our paths: as Wan publishes it, and as transformers names it."""

from __future__ import annotations

from lavatar_jax.checkpoints.convert import Rule

_LAYER = r"blocks\.(?P<layer>\d+)\."
_HF_LAYER = r"encoder\.block\.(?P<layer>\d+)\.layer\."
_HF_ATTENTION = _HF_LAYER + r"0\.SelfAttention\."
_HF_FFN = _HF_LAYER + r"1\.DenseReluDense\."

# models_t5_umt5-xxl-enc-bf16.pth
UMT5_RULES: list[Rule] = [
    Rule(r"token_embedding\.weight", "embedding"),
    Rule(_LAYER + r"norm1\.weight", "blocks.attention_norm.weight"),
    *[Rule(_LAYER + rf"attn\.{name}\.weight", f"blocks.attention.{name}", "linear") for name in "qkvo"],
    Rule(_LAYER + r"pos_embedding\.embedding\.weight", "blocks.attention.position_bias"),
    Rule(_LAYER + r"norm2\.weight", "blocks.ffn_norm.weight"),
    Rule(_LAYER + r"ffn\.gate\.0\.weight", "blocks.ffn.gate", "linear"),
    Rule(_LAYER + r"ffn\.fc1\.weight", "blocks.ffn.inner", "linear"),
    Rule(_LAYER + r"ffn\.fc2\.weight", "blocks.ffn.outer", "linear"),
    Rule(r"norm\.weight", "norm.weight"),
]

# UMT5EncoderModel of transformers
UMT5_TRANSFORMERS_RULES: list[Rule] = [
    Rule(r"shared\.weight", "embedding"),
    Rule(r"encoder\.embed_tokens\.weight", None),  # the same tensor under a second name
    Rule(_HF_LAYER + r"0\.layer_norm\.weight", "blocks.attention_norm.weight"),
    *[Rule(_HF_ATTENTION + rf"{name}\.weight", f"blocks.attention.{name}", "linear") for name in "qkvo"],
    Rule(_HF_ATTENTION + r"relative_attention_bias\.weight", "blocks.attention.position_bias"),
    Rule(_HF_LAYER + r"1\.layer_norm\.weight", "blocks.ffn_norm.weight"),
    Rule(_HF_FFN + r"wi_0\.weight", "blocks.ffn.gate", "linear"),
    Rule(_HF_FFN + r"wi_1\.weight", "blocks.ffn.inner", "linear"),
    Rule(_HF_FFN + r"wo\.weight", "blocks.ffn.outer", "linear"),
    Rule(r"encoder\.final_layer_norm\.weight", "norm.weight"),
]
