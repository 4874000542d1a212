"""The published folder `Wan2.2-S2V-14B`: which file holds which component, and what its sizes mean."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from lavatar_jax.checkpoints.convert import Rule
from lavatar_jax.checkpoints.sources import TensorInfo, Tensors, open_safetensors, read_json
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.checkpoints.tables_umt5 import UMT5_RULES
from lavatar_jax.checkpoints.tables_vae import VAE_RULES
from lavatar_jax.checkpoints.tables_wav2vec2 import WAV2VEC2_RULES
from lavatar_jax.config import DiTConfig, SamplingConfig, VAEConfig
from lavatar_jax.errors import UserError
from lavatar_jax.models.avatar import AvatarConfig
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.umt5 import UMT5Config, UMT5Encoder
from lavatar_jax.models.vae import make_vae
from lavatar_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config

Infos = Mapping[str, TensorInfo]
Open = Callable[[Path], Tensors]

TOKENIZER = "google/umt5-xxl"
SPEECH = "wav2vec2-large-xlsr-53-english"
AREA = (720, 400)  # pixels; the released scripts' default, for photos of all proportions

# Files of each component, the first that is there is read. Those ending in .pth or .bin need torch. What is
# published of VAE and text encoder is the .pth: who put the other one beside it, wants that one read.
FILES: dict[str, tuple[str, ...]] = {
    "dit": ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
    "vae": ("Wan2.1_VAE.safetensors", "Wan2.1_VAE.pth"),
    "text": ("models_t5_umt5-xxl-enc-bf16.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"),
    "speech": (f"{SPEECH}/model.safetensors", f"{SPEECH}/pytorch_model.bin"),
}
RULES: dict[str, list[Rule]] = {
    "dit": DIT_RULES, "vae": VAE_RULES["wan21"], "text": UMT5_RULES, "speech": WAV2VEC2_RULES,
}  # fmt: skip

# Settings of config.json that change the computation, with the only value that is implemented.
_FIXED: dict[str, Any] = {
    "model_type": "s2v", "enable_adain": True, "adain_mode": "attn_norm", "enable_framepack": True,
    "enable_motioner": False, "enable_tsm": False, "add_last_motion": True, "framepack_drop_mode": "padd",
    "zero_timestep": True, "trainable_token_pos_emb": False, "qk_norm": True, "cross_attn_norm": True,
    "eps": 1e-6, "patch_size": [1, 2, 2], "window_size": [-1, -1],
}  # fmt: skip
_SIZES = ("dim", "ffn_dim", "num_heads", "num_layers", "audio_dim", "audio_inject_layers")
_OTHER_SIZES = {
    "freq_dim": 256,
    "in_dim": 16,
    "out_dim": 16,
    "cond_dim": 16,
    "text_dim": 4096,
    "text_len": 512,
}
_OTHER_SIZES |= {"num_audio_token": 4}
_WITHOUT_EFFECT = {"zero_init", "motion_token_num"}  # initial values; a part that enable_motioner turns off
_CLASSES = ("WanModel_S2V", "CausalWanModel_S2V")


@dataclasses.dataclass(frozen=True)
class Published:
    """An opened folder: the tensors of each component, and the configuration of the whole."""

    folder: Path
    tensors: dict[str, Tensors]
    config: AvatarConfig

    @property
    def files(self) -> list[Path]:
        """Everything that the result depends on."""
        settings = [self.folder / "config.json", self.folder / SPEECH / "config.json"]
        tokenizer = sorted(path for path in (self.folder / TOKENIZER).iterdir() if path.is_file())
        return [*settings, *(file for tensors in self.tensors.values() for file in tensors.files), *tokenizer]


def open_published(folder: Path, open_pickle: Open) -> Published:
    """Open all files of a folder; reads headers only. `open_pickle` opens .pth and .bin files.

    Raises UserError naming the file that is missing, damaged or of another architecture, and settings that
    are not supported or do not fit together.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder of the published checkpoint")
    values = read_json(folder / "config.json")
    check_settings(values, folder / "config.json")
    speech = read_json(folder / SPEECH / "config.json")
    if not any((folder / TOKENIZER / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise UserError(
            f"{folder / TOKENIZER}: no tokenizer.json or spiece.model in this folder; copy it there"
        )
    tensors = {component: _open(folder, names, open_pickle) for component, names in FILES.items()}
    config = avatar_config(folder.resolve().name, values, speech, {k: t.infos for k, t in tensors.items()})
    return Published(folder, tensors, config)


def avatar_config(
    name: str, values: Mapping[str, Any], speech: Mapping[str, Any], infos: Mapping[str, Infos]
) -> AvatarConfig:
    """Configuration of the whole from the two `config.json`s and tensors' shapes.

    Raises UserError for settings that are not supported, and components that do not fit together.
    """
    dit = dit_config(values, infos["dit"])
    vae, text = vae_config(infos["vae"]), text_config(infos["text"])
    hear = dataclasses.replace(
        Wav2Vec2Config.from_huggingface(speech, f"{SPEECH}/config.json"),
        mask_vector="wav2vec2.masked_spec_embed" in infos["speech"],
    )
    for what, wanted, found in (
        ("text_dim", dit.text_dim, text.width),
        ("in_dim", dit.latent_channels, vae.latent_channels),
        ("audio_dim", dit.audio_dim, hear.width),
        ("number of speech states", dit.audio_layers, hear.layers + 1),
    ):
        if wanted != found:
            raise UserError(f"{name}: the transformer's {what} is {wanted}, its encoder gives {found}")
    return AvatarConfig(
        name=name, image_size=AREA, dit=dit, vae=vae, text=text, speech=hear, sampling=SamplingConfig()
    )


def check_settings(values: Mapping[str, Any], file: Path) -> None:
    """Raises UserError unless a transformer's `config.json` is of the architecture that we have."""
    if (kind := values.get("_class_name")) not in _CLASSES:
        raise UserError(f"{file}: the architecture {kind!r} is not supported, only {_CLASSES[0]}")
    for name, wanted in _FIXED.items():
        if values.get(name, wanted) != wanted:
            raise UserError(f"{file}: {name} {values[name]!r} is not supported, only {wanted!r}")
    for name in _SIZES:
        if name not in values:
            raise UserError(f"{file} lacks the setting {name}; copy it again")
    sizes = {*_SIZES, *_OTHER_SIZES}
    for name, value in values.items():
        known = name.startswith("_") or name in sizes or name in _FIXED or name in _WITHOUT_EFFECT
        if not known and value not in (None, False, 0, "", []):
            raise UserError(
                f"{file}: the setting {name} {value!r} is unknown, and may change what is computed"
            )
    if (values.get("in_dim", 16), values.get("cond_dim", 16)) != (values.get("out_dim", 16),) * 2:
        raise UserError(f"{file}: in_dim, out_dim and cond_dim differ, which is not supported")


def dit_config(values: Mapping[str, Any], infos: Infos) -> DiTConfig:
    """The transformer's sizes by the names of its `config.json`. Raises UserError if they do not fit."""
    sizes: dict[str, Any] = {**_OTHER_SIZES, **values}
    weights = infos.get("casual_audio_encoder.weights")
    try:
        return DiTConfig(
            layers=sizes["num_layers"],
            width=sizes["dim"],
            heads=sizes["num_heads"],
            ffn_width=sizes["ffn_dim"],
            latent_channels=sizes["in_dim"],
            freq_dim=sizes["freq_dim"],
            text_dim=sizes["text_dim"],
            text_len=sizes["text_len"],
            audio_dim=sizes["audio_dim"],
            audio_layers=weights.shape[1] if weights else DiTConfig.audio_layers,
            audio_tokens=sizes["num_audio_token"],
            inject_layers=tuple(sizes["audio_inject_layers"]),
            attention="auto",  # logits of the published sizes are gigabytes, which XLA keeps in memory
        )
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"config.json: {error}") from None


def dit_settings(config: DiTConfig) -> dict[str, Any]:
    """The published form of a transformer's `config.json`."""
    channels = config.latent_channels
    return {
        "_class_name": _CLASSES[0], **_FIXED, "dim": config.width, "ffn_dim": config.ffn_width,
        "num_heads": config.heads, "num_layers": config.layers, "freq_dim": config.freq_dim,
        "in_dim": channels, "out_dim": channels, "cond_dim": channels if config.use_pose else 0,
        "text_dim": config.text_dim, "text_len": config.text_len, "audio_dim": config.audio_dim,
        "num_audio_token": config.audio_tokens, "audio_inject_layers": config.inject_layers,
        "enable_framepack": config.use_motion, "patch_size": [1, config.patch, config.patch],
    }  # fmt: skip


def inferred_settings(infos: Infos) -> dict[str, Any]:
    """What `config.json` would say of these tensors; heads are taken to be 128 wide, as in the release."""
    injected = _count(infos, r"audio_injector\.injector\.(\d+)\.q\.weight")
    usual = DiTConfig.inject_layers
    width = _shape(infos, "patch_embedding.weight")[0]
    return {
        "dim": width,
        "ffn_dim": _shape(infos, "blocks.0.ffn.0.weight")[0],
        "num_heads": max(width // 128, 1),
        "num_layers": _count(infos, r"blocks\.(\d+)\.norm3\.weight"),
        "audio_dim": _shape(infos, "casual_audio_encoder.encoder.conv1_local.conv.weight")[1],
        "audio_inject_layers": usual if injected == len(usual) else tuple(range(injected)),
        "text_dim": _shape(infos, "text_embedding.0.weight")[1],
        "in_dim": _shape(infos, "patch_embedding.weight")[1],
    }


def vae_config(infos: Infos) -> VAEConfig:
    """Wan 2.1's VAE with the widths that the tensors have."""
    width = _shape(infos, "encoder.conv1.weight")[0]
    last = _shape(infos, "decoder.head.2.weight")[1]
    channels = _shape(infos, "conv2.weight")[0]
    if channels != VAEConfig.latent_channels:
        raise UserError(f"{_file(infos)}: conv2.weight has {channels} latent channels instead of 16")
    return VAEConfig(width=width, decoder_width=None if last == width else last)


def text_config(infos: Infos) -> UMT5Config:
    """umT5 with the sizes that the tensors have."""
    vocabulary, width = _shape(infos, "token_embedding.weight")
    buckets, heads = _shape(infos, "blocks.0.pos_embedding.embedding.weight")
    try:
        return UMT5Config(
            vocabulary=vocabulary,
            width=width,
            attention_width=_shape(infos, "blocks.0.attn.q.weight")[0],
            ffn_width=_shape(infos, "blocks.0.ffn.fc1.weight")[0],
            layers=_count(infos, r"blocks\.(\d+)\.norm1\.weight"),
            heads=heads,
            buckets=buckets,
        )
    except ValueError as error:
        raise UserError(f"{_file(infos)}: {error}") from None


def speech_config(infos: Infos) -> Wav2Vec2Config:
    """wav2vec2-large with the widths that the tensors have, where there is no config.json."""
    position = next((key for key in infos if key.endswith(("weight.original1", "conv.weight_v"))), "position")
    width, per_group, kernel = _shape(infos, position)
    convs = [_shape(infos, f"wav2vec2.feature_extractor.conv_layers.{i}.conv.weight") for i in range(7)]
    return Wav2Vec2Config(
        layers=_count(infos, r"wav2vec2\.encoder\.layers\.(\d+)\.layer_norm\.weight"),
        width=width,
        ffn_width=_shape(infos, "wav2vec2.encoder.layers.0.feed_forward.intermediate_dense.weight")[0],
        conv_width=tuple(shape[0] for shape in convs),
        conv_kernel=tuple(shape[2] for shape in convs),
        position_kernel=kernel,
        position_groups=width // per_group,
        vocabulary=_shape(infos, "lm_head.weight")[0],
        mask_vector="wav2vec2.masked_spec_embed" in infos,
    )


def make_component(name: str, config: Any) -> Any:
    """A model of its configuration; under jax.eval_shape, nothing is allocated."""
    make: dict[str, Callable[..., Any]] = {
        "dit": CausalDiT, "vae": make_vae, "text": UMT5Encoder, "speech": Wav2Vec2,
    }  # fmt: skip
    return make[name](config, rngs=nnx.Rngs(0))


def _open(folder: Path, names: tuple[str, ...], open_pickle: Open) -> Tensors:
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{' or '.join(str(folder / name) for name in names)} is missing; copy it there")
    return open_pickle(path) if path.suffix in (".pth", ".bin") else open_safetensors(path)


def _shape(infos: Infos, key: str) -> tuple[int, ...]:
    if key not in infos:
        raise UserError(f"{_file(infos)}: the tensor {key} is missing")
    axes = {"bias": 1, "weights": 4}.get(key.rsplit(".", 1)[-1])
    shape = infos[key].shape
    if axes not in (None, len(shape)) or len(shape) < 2:
        raise UserError(f"{infos[key].file}: the tensor {key} has the unexpected shape {list(shape)}")
    return shape


def _count(infos: Infos, pattern: str) -> int:
    """The layers of a stack, by its numbered keys."""
    return 1 + max((int(match[1]) for key in infos if (match := re.fullmatch(pattern, key))), default=-1)


def _file(infos: Infos) -> Any:
    return next((info.file for info in infos.values()), "the checkpoint")
