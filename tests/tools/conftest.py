import jax
import numpy as np
import pytest

from lavatar_jax.data.faces import draw_identity, render
from lavatar_jax.data.motion import Manner, talking_motion
from tests.tools.videos import FRAMES
from tools import real_encode

SIZE = 256
SPEAKERS = (1, 4)  # identities whose faces OpenCV finds


@pytest.fixture
def cheap_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are small pictures: every 4th frame at an 8th of the size."""

    def shrink(vae: object, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.asarray(video, np.float32)[::4] / 127.5 - 1
        count, height, width, _ = pixels.shape
        cells = pixels.reshape(count, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4))
        return np.tile(cells, 6)[..., :16], np.zeros(16)

    monkeypatch.setattr(real_encode, "_encode", shrink)


@pytest.fixture(scope="module")
def faces() -> list[np.ndarray]:
    """Two people who talk: uint8 [T, H, W, 3]."""
    draw = jax.jit(lambda identity, motion: (127.5 * (render(identity, motion, SIZE) + 1)).astype(np.uint8))
    random = np.random.default_rng(0)
    openness = random.uniform(size=FRAMES).astype(np.float32)
    motion = talking_motion(openness, openness, Manner(), 0)
    return [np.asarray(draw(draw_identity(identity), motion)) for identity in SPEAKERS]
