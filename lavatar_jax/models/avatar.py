"""A complete talking model: transformer, VAE, and how pictures, speech and prompts reach them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from lavatar_jax.config import DiTConfig, SamplingConfig, VAEConfig
from lavatar_jax.errors import UserError
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.models.umt5 import UMT5Config
from lavatar_jax.models.vae import CausalVAE
from lavatar_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class AvatarConfig:
    """`config.json` of a model folder.

    `image_size`: pixels of the video. An int: always this square, as the model was trained. (height, width):
    their product is the largest area, and each photo gets a size of its own proportions within it, as in the
    reference.
    """

    name: str
    image_size: int | tuple[int, int]
    fps: int = 25
    dit: DiTConfig
    vae: VAEConfig
    sampling: SamplingConfig
    log_mel: LogMelConfig | None = None  # what listens: this,
    speech: Wav2Vec2Config | None = None  # or this
    text: UMT5Config | None = None  # what reads prompts; None: hashed words

    def __post_init__(self) -> None:
        if (self.log_mel is None) == (self.speech is None):
            raise ValueError("a model listens through exactly one of log_mel and speech")


class Avatar(NamedTuple):
    """What talks. The text encoder is no part of it: it is needed once a prompt, and the published one would
    take 11 GB all the time."""

    config: AvatarConfig
    dit: CausalDiT
    vae: CausalVAE
    speech: Wav2Vec2 | None = None  # where the configuration has it


def square_size(avatar: Avatar) -> int:
    """Height and width of a model's pictures. Raises UserError for models that make any size."""
    if not isinstance(avatar.config.image_size, int):
        name = avatar.config.name
        raise UserError(f"{name} makes pictures of any size, and this is for models of faces of one size")
    return avatar.config.image_size
