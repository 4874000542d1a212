"""A video at one glance: evenly spaced frames in one picture."""

from __future__ import annotations

import numpy as np


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, H, W, 3] -> [rows * H, columns * W, 3], row by row; white where images are missing."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, 3), 255, np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return sheet.reshape(rows * height, columns * width, 3)


class ContactSheet:
    """Collects its frames while the video of `total` frames is made; keeps only those it shows."""

    def __init__(self, total: int, *, columns: int = 6, rows: int = 4) -> None:
        self._wanted = np.unique(np.linspace(0, total - 1, columns * rows).round().astype(int))
        self._columns = min(columns, len(self._wanted))
        self._seen = 0
        self._images: list[np.ndarray] = []

    def add(self, frames: np.ndarray) -> None:
        """The next uint8 [T, H, W, 3] of the video."""
        here = self._wanted - self._seen
        self._images += [frames[i].copy() for i in here[(here >= 0) & (here < len(frames))]]
        self._seen += len(frames)

    def image(self) -> np.ndarray:
        """The sheet of what was added so far (at least one frame)."""
        return tile(np.stack(self._images), self._columns)
