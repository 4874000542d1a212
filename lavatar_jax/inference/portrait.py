"""A photo and a prompt for a video of a given size: what a session starts from."""

from __future__ import annotations

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lavatar_jax.errors import UserError
from lavatar_jax.inference.conditions import image_conditions
from lavatar_jax.inference.images import cover_and_crop, load_image, size_less_than_area
from lavatar_jax.models.avatar import Avatar, AvatarConfig
from lavatar_jax.models.words import encode_words
from lavatar_jax.types import Conditions


def video_sides(config: AvatarConfig) -> tuple[int, int]:
    """(height, width) of the videos a host makes, in pixels: one size for photos of all proportions.

    For models of an area it is the square that fits into it, which loses least of tall and of wide photos.
    """
    if isinstance(config.image_size, int):
        return config.image_size, config.image_size
    area = math.prod(config.image_size)
    return size_less_than_area(math.isqrt(area), math.isqrt(area), area)


def hashed_words(config: AvatarConfig, prompt: str) -> Float[Array, "1 S E"]:
    """A prompt for models without a text encoder. Raises UserError for the others."""
    if config.text is not None:
        raise UserError(f"{config.name} reads prompts with a text encoder: give the states of the prompt")
    return jnp.asarray(encode_words(prompt, config.dit.text_len, config.dit.text_dim))[None]


def portrait_conditions(
    avatar: Avatar,
    image: UInt8[np.ndarray, "H W 3"] | str | Path,
    text: Float[Array, "1 S E"],
    size: tuple[int, int],
) -> Conditions:
    """A photo (pixels or a file), which covers `size` (height, width): its middle, without black bars.

    Raises UserError for what is no picture.
    """
    config = avatar.config
    if isinstance(image, str | Path):
        image = load_image(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise UserError("a picture is a file, or pixels uint8 [height, width, 3]")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"a picture has pixels [height, width, 3], not {list(image.shape)}")
    photo = cover_and_crop(image, *size)
    return image_conditions(config.dit, avatar.vae, config.sampling, photo, text)
