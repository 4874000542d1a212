"""A complete talking model: transformer, VAE, and how pictures, speech and prompts reach them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from lavatar_jax.config import DiTConfig, SamplingConfig, VAEConfig
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.models.vae import CausalVAE


@dataclasses.dataclass(frozen=True, kw_only=True)
class AvatarConfig:
    """`config.json` of a model folder."""

    name: str
    image_size: int  # pixels; the video is square, as the model was trained
    fps: int = 25
    dit: DiTConfig
    vae: VAEConfig
    sampling: SamplingConfig
    log_mel: LogMelConfig


class Avatar(NamedTuple):
    config: AvatarConfig
    dit: CausalDiT
    vae: CausalVAE
