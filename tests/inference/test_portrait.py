"""One size of video for photos of all proportions."""

import dataclasses

import numpy as np
import pytest

from lavatar_jax.config import SamplingConfig
from lavatar_jax.inference import portrait
from lavatar_jax.models.avatar import Avatar, AvatarConfig
from lavatar_jax.models.logmel import LogMelConfig
from tests.tiny import tiny_config, tiny_vae_config

CONFIG = AvatarConfig(
    name="test", image_size=(720, 400), dit=tiny_config(), vae=tiny_vae_config(), sampling=SamplingConfig(),
    log_mel=LogMelConfig(bands=2, pooled=1),
)  # fmt: skip


def test_an_area_means_the_square_that_fits_into_it() -> None:
    assert portrait.video_sides(CONFIG) == (512, 512)
    assert portrait.video_sides(dataclasses.replace(CONFIG, image_size=(64, 64))) == (64, 64)
    assert portrait.video_sides(dataclasses.replace(CONFIG, image_size=128)) == (128, 128)


@pytest.mark.parametrize("image_size", [(720, 400), 64])
@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("photo", [(40, 40), (90, 30), (30, 90)])
def test_a_photo_fills_the_video(
    monkeypatch: pytest.MonkeyPatch,
    image_size: int | tuple[int, int],
    size: tuple[int, int],
    photo: tuple[int, int],
) -> None:
    monkeypatch.setattr(portrait, "image_conditions", lambda dit, vae, sampling, image, text: image)
    avatar = Avatar(dataclasses.replace(CONFIG, image_size=image_size), None, None)
    image = portrait.portrait_conditions(avatar, np.full((*photo, 3), 200, np.uint8), None, size)
    assert image.shape == (*size, 3)
    assert (image == 200).all()
