"""A host that needs no model: the picture it is given, with a mouth that opens when there is sound.

With `stamped`, frames carry the time at which they are due, as a bar code: a viewer can tell their age.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tests.serving.fake_host import FPS, FakeHost, FakeSession

SIZE = 128


class PuppetHost(FakeHost):
    def __init__(self, slots: int = 1, *, stamped: bool = False) -> None:
        super().__init__(slots)
        self.size, self.stamped = (SIZE, SIZE), stamped

    def open(self, image: np.ndarray, *, prompt: str = "", seed: int = 0, **options: object) -> FakeSession:
        session = super().open(image, prompt=prompt, seed=seed, **options)
        picture = Image.fromarray(image).resize((SIZE, SIZE))
        grey = session.read

        def read(timeout: float | None = 0.0) -> Any:
            block = grey(timeout)
            if block is None:
                return None
            frames = _frames(picture, block.sound)
            return dataclasses.replace(block, frames=_stamp(frames) if self.stamped else frames)

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
        frames.append(np.array(frame))
    return np.stack(frames)


def _stamp(frames: np.ndarray) -> np.ndarray:
    """32 bits of milliseconds in the last rows but eight, most significant first; below, their complement."""
    now = int(1e3 * time.time())
    for index, frame in enumerate(frames):
        due = (now + index * 1000 // FPS) & 0xFFFFFFFF
        bits = np.array([due >> shift & 1 for shift in range(31, -1, -1)], np.uint8)
        columns = np.repeat(bits, SIZE // 32)[None, :, None]
        frame[-16:-8], frame[-8:] = 255 * columns, 255 * (1 - columns)
    return frames
