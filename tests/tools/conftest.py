import numpy as np
import pytest

from tools import real_encode


@pytest.fixture
def cheap_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are small pictures: every 4th frame at an 8th of the size."""

    def shrink(vae: object, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.asarray(video, np.float32)[::4] / 127.5 - 1
        count, height, width, _ = pixels.shape
        cells = pixels.reshape(count, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4))
        return np.tile(cells, 6)[..., :16], np.zeros(16)

    monkeypatch.setattr(real_encode, "_encode", shrink)
