"""Writes folders as they are published (`Wan2.2-S2V-14B` and the Live Avatar LoRA), at small widths.

File names, key names, dtypes and layouts are the published ones; every number is random, none is zero, so
that a tensor that is forgotten or turned round shows. torch is needed for the two `.pth` files only.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from lavatar_jax.checkpoints.convert import export
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.checkpoints.tables_vae import VAE_RULES
from lavatar_jax.config import DiTConfig, VAEConfig
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.vae import make_vae

INDEX = "diffusion_pytorch_model.safetensors.index.json"
TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
VAE = "Wan2.1_VAE.pth"
TOKENIZER = "google/umt5-xxl"
SPEECH = "wav2vec2-large-xlsr-53-english"
LORA = "liveavatar.safetensors"

DIT_CONFIG = DiTConfig(
    layers=4, width=32, heads=2, ffn_width=48, text_dim=24, audio_dim=32, audio_layers=4,
    inject_layers=(0, 2), attention="auto",
)  # fmt: skip
VAE_CONFIG = VAEConfig(width=8)
LORA_RANK = 4

SPEECH_CONFIG: dict[str, Any] = {
    "architectures": ["Wav2Vec2ForCTC"],
    "model_type": "wav2vec2",
    "vocab_size": 33,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "feat_extract_norm": "layer",
    "feat_extract_activation": "gelu",
    "conv_dim": [16] * 7,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_bias": True,
    "num_feat_extract_layers": 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "do_stable_layer_norm": True,
    "pad_token_id": 0,
}

Tensors = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


class Published(NamedTuple):
    """Where the fixture lies, and its tensors as they were written, by file (the DiT's by key alone)."""

    wan: Path
    lora: Path
    dit: Tensors
    vae: Tensors
    text: Tensors
    speech: Tensors
    adapters: Tensors


def write_published(folder: Path, *, seed: int = 0, shards: int = 4, pickled: bool = True) -> Published:
    """Writes `folder/Wan2.2-S2V-14B` and `folder/Live-Avatar/liveavatar.safetensors`.

    `pickled`: with .pth files, as published, otherwise with .safetensors in their place. Skips the calling
    test where torch (for those) or tokenizers are not installed.
    """
    wan, lora = folder / "Wan2.2-S2V-14B", folder / "Live-Avatar" / LORA
    for path in (wan / TOKENIZER, wan / SPEECH, lora.parent):
        path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    dit = random_tensors(rng, dit_shapes(), ml_dtypes.bfloat16)
    vae = random_tensors(rng, vae_shapes())
    text = random_tensors(rng, text_shapes(), ml_dtypes.bfloat16)
    speech = random_tensors(rng, speech_shapes())
    adapters = random_tensors(rng, lora_shapes())
    write_shards(wan, dit, shards)
    (wan / "config.json").write_text(json.dumps(dit_json(), indent=2))
    for name, tensors in ((VAE, vae), (TEXT, text)):
        if pickled:
            write_pth(wan / name, tensors)
        else:
            save_file(tensors, (wan / name).with_suffix(".safetensors"))
    write_tokenizer(wan / TOKENIZER)
    save_file(speech, wan / SPEECH / "model.safetensors", {"format": "pt"})
    (wan / SPEECH / "config.json").write_text(json.dumps(SPEECH_CONFIG, indent=2))
    (wan / SPEECH / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))
    save_file(adapters, lora, {"format": "pt"})
    return Published(wan, lora, dit, vae, text, speech, adapters)


def random_tensors(rng: np.random.Generator, shapes: Shapes, dtype: Any = np.float32) -> Tensors:
    """Numbers that keep activations near unit variance: weights scaled by their fan-in, norms around 1."""

    def numbers(key: str, shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape)
        if key.endswith(("original0", "weight_g")):  # a weight norm's length: that of its direction, nearly
            return math.sqrt(SPEECH_CONFIG["hidden_size"] / shape[-1]) * (1 + 0.2 * x)
        if math.prod(shape) == max(shape):
            return 0.2 * x + (("norm" in key and key.endswith("weight")) or key.endswith("gamma"))
        return x / math.sqrt(math.prod(shape[1:]))

    return {key: numbers(key, shape).astype(dtype) for key, shape in shapes.items()}


# The transformer


def dit_json() -> dict[str, Any]:
    """The published `config.json`, with the small widths."""
    config = DIT_CONFIG
    return {
        "_class_name": "WanModel_S2V",
        "_diffusers_version": "0.34.0",
        "adain_mode": "attn_norm",
        "add_last_motion": True,
        "audio_dim": config.audio_dim,
        "audio_inject_layers": list(config.inject_layers),
        "cond_dim": config.latent_channels,
        "dim": config.width,
        "enable_adain": True,
        "enable_framepack": True,
        "enable_motioner": False,
        "enable_tsm": False,
        "eps": 1e-06,
        "ffn_dim": config.ffn_width,
        "framepack_drop_mode": "padd",
        "freq_dim": config.freq_dim,
        "in_dim": config.latent_channels,
        "model_type": "s2v",
        "num_audio_token": config.audio_tokens,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "out_dim": config.latent_channels,
        "text_dim": config.text_dim,
        "text_len": config.text_len,
        "zero_init": True,
        "zero_timestep": True,
    }


def dit_shapes() -> Shapes:
    return _shapes(lambda: CausalDiT(DIT_CONFIG, rngs=nnx.Rngs(0)), DIT_RULES)


def vae_shapes() -> Shapes:
    return _shapes(lambda: make_vae(VAE_CONFIG, rngs=nnx.Rngs(0)), VAE_RULES[VAE_CONFIG.kind])


def _shapes(make: Any, rules: Any) -> Shapes:
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.int8), jax.eval_shape(make))
    return {key: tensor.shape for key, tensor in export(zeros, rules).items()}


def write_shards(folder: Path, tensors: Tensors, count: int) -> None:
    """`diffusion_pytorch_model-00001-of-0000N.safetensors` and their index; keys in order."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    names = [f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    weight_map = {key: names[i * count // len(tensors)] for i, key in enumerate(tensors)}
    for name in names:
        save_file({k: tensors[k] for k in tensors if weight_map[k] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def lora_shapes(prefix: str = "base_model.model.", adapter: str = ".default") -> Shapes:
    """Two matrices for each Linear of attention and feed-forward layers, and of the audio injectors."""
    shapes = {}
    for key, shape in dit_shapes().items():
        module, _, kind = key.rpartition(".")
        target = module.endswith((".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2"))
        if target and kind == "weight":
            shapes[f"{prefix}{module}.lora_A{adapter}.weight"] = (LORA_RANK, shape[1])
            shapes[f"{prefix}{module}.lora_B{adapter}.weight"] = (shape[0], LORA_RANK)
    return shapes


# The text encoder and its tokeniser


def text_shapes(
    *, vocab: int = 128, width: int = 24, attention: int = 32, heads: int = 4, ffn: int = 40, layers: int = 2
) -> Shapes:
    """umT5 as Wan publishes it. Here the attention is wider than the states, so a mix-up would show."""
    block = {
        "norm1.weight": (width,),
        "attn.q.weight": (attention, width),
        "attn.k.weight": (attention, width),
        "attn.v.weight": (attention, width),
        "attn.o.weight": (width, attention),
        "norm2.weight": (width,),
        "ffn.gate.0.weight": (ffn, width),
        "ffn.fc1.weight": (ffn, width),
        "ffn.fc2.weight": (width, ffn),
        "pos_embedding.embedding.weight": (32, heads),
    }
    return (
        {"token_embedding.weight": (vocab, width)}
        | {f"blocks.{i}.{key}": shape for i in range(layers) for key, shape in block.items()}
        | {"norm.weight": (width,)}
    )


def pieces() -> list[tuple[str, float]]:
    """A unigram vocabulary with umT5's special tokens, letters, and a few words; the rarer, the lower."""
    letters = "\u2581etaoinshrdlucmfwypvbgkjqxz.,!?'-0123456789ETAOINSHRDLUCMFWYPVBGKJQXZ"
    words = ["\u2581person", "\u2581talking", "\u2581smil", "ing", "\u2581a", "\u2581the", "\u2581is"]
    plain = [(piece, -2.0 - 0.1 * i) for i, piece in enumerate([*words, *letters])]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0), *plain]


def write_tokenizer(folder: Path) -> None:
    """`tokenizer.json`, `spiece.model` and the small files of a Hugging Face tokeniser."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = pieces()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    special = [tokenizers.AddedToken(p, special=True, normalized=False) for p, _ in vocabulary[:4]]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2))
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 10**30, "extra_ids": 0, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "spiece.model").write_bytes(_sentencepiece(vocabulary))


def _sentencepiece(vocabulary: list[tuple[str, float]]) -> bytes:
    """The pieces as sentencepiece's protocol buffer: field 1 repeated, of (1: text, 2: score, 3: type)."""
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3, "<s>": 3}
    message = b""
    for piece, score in vocabulary:
        text = piece.encode()
        entry = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score)
        entry += b"\x18" + bytes([kinds.get(piece, 1)])
        message += b"\x0a" + bytes([len(entry)]) + entry
    return message


def write_pth(path: Path, tensors: Tensors) -> None:
    """A state dictionary by `torch.save`, as it is published."""
    torch = pytest.importorskip("torch")

    def to_torch(x: np.ndarray) -> Any:
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    torch.save({key: to_torch(tensor) for key, tensor in tensors.items()}, path)


# The speech encoder

PREPROCESSOR = {
    "do_normalize": True,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16000,
}


def speech_shapes(weight_norm: tuple[str, str] = ("weight_g", "weight_v")) -> Shapes:
    """Wav2Vec2ForCTC; `weight_norm`: how the file names the positional convolution's length and direction.

    Published files have the old names; newer versions of transformers write
    `parametrizations.weight.original0` and `original1`.
    """
    config = SPEECH_CONFIG
    width, ffn, kernel = config["hidden_size"], config["intermediate_size"], config["num_conv_pos_embeddings"]
    channels = [1, *config["conv_dim"]]
    conv = {
        f"feature_extractor.conv_layers.{i}.{key}": shape
        for i, size in enumerate(config["conv_kernel"])
        for key, shape in {
            "conv.weight": (channels[i + 1], channels[i], size),
            "conv.bias": (channels[i + 1],),
            "layer_norm.weight": (channels[i + 1],),
            "layer_norm.bias": (channels[i + 1],),
        }.items()
    }
    linears: dict[str, tuple[int, ...]]
    linears = {f"attention.{name}_proj": (width, width) for name in ("k", "v", "q", "out")}
    linears |= {"feed_forward.intermediate_dense": (ffn, width), "feed_forward.output_dense": (width, ffn)}
    layer: dict[str, tuple[int, ...]] = {f"{key}.weight": shape for key, shape in linears.items()}
    layer |= {f"{key}.bias": shape[:1] for key, shape in linears.items()}
    layer |= {f"{n}.{k}": (width,) for n in ("layer_norm", "final_layer_norm") for k in ("weight", "bias")}
    body = {
        "masked_spec_embed": (width,),
        **conv,
        "feature_projection.layer_norm.weight": channels[-1:],
        "feature_projection.layer_norm.bias": channels[-1:],
        "feature_projection.projection.weight": (width, channels[-1]),
        "feature_projection.projection.bias": (width,),
        "encoder.pos_conv_embed.conv.bias": (width,),
        f"encoder.pos_conv_embed.conv.{weight_norm[0]}": (1, 1, kernel),
        f"encoder.pos_conv_embed.conv.{weight_norm[1]}": (
            width,
            width // config["num_conv_pos_embedding_groups"],
            kernel,
        ),
        "encoder.layer_norm.weight": (width,),
        "encoder.layer_norm.bias": (width,),
    }
    for i in range(config["num_hidden_layers"]):
        body |= {f"encoder.layers.{i}.{key}": shape for key, shape in layer.items()}
    head = {"lm_head.weight": (config["vocab_size"], width), "lm_head.bias": (config["vocab_size"],)}
    return {f"wav2vec2.{key}": tuple(shape) for key, shape in body.items()} | head
