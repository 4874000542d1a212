"""A host that needs no model: the picture it is given, with a mouth that opens when there is sound."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tests.serving.fake_host import FPS, FakeHost, FakeSession

SIZE = 128


class PuppetHost(FakeHost):
    def __init__(self, slots: int = 1) -> None:
        super().__init__(slots)
        self.size = (SIZE, SIZE)

    def open(self, image: np.ndarray, *, prompt: str = "", seed: int = 0, **options: object) -> FakeSession:
        session = super().open(image, prompt=prompt, seed=seed, **options)
        picture = Image.fromarray(image).resize((SIZE, SIZE))
        grey = session.read

        def read(timeout: float | None = 0.0) -> Any:
            block = grey(timeout)
            return block and dataclasses.replace(block, frames=_frames(picture, block.sound))

        session.read = read  # type: ignore[method-assign]
        return session


def _frames(picture: Image.Image, sound: np.ndarray) -> np.ndarray:
    frames = []
    for piece in sound.reshape(-1, 16_000 // FPS):
        opening = min(1.0, 6 * float(np.sqrt(np.mean(piece**2))))
        frame = picture.copy()
        if opening > 0.05:
            middle, half = 0.74 * SIZE, 0.09 * SIZE * opening
            mouth = (0.41 * SIZE, middle - half, 0.59 * SIZE, middle + half)
            ImageDraw.Draw(frame).ellipse(mouth, fill=(70, 10, 15))
        frames.append(np.asarray(frame))
    return np.stack(frames)
