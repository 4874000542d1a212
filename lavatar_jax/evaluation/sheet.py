"""Contact sheets: rows of pictures with a label, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from lavatar_jax.files import replacing

LABEL_HEIGHT = 14
GAP = 2


def to_uint8(video: ArrayLike) -> NDArray[np.uint8]:
    """[-1, 1] to 0 .. 255."""
    return np.clip(np.asarray(video, np.float32) * 127.5 + 128.0, 0, 255).astype(np.uint8)


def contact_sheet(rows: Sequence[tuple[str, ArrayLike]], *, scale: int = 1) -> Image.Image:
    """Draws rows of (label, pictures [N, H, W, 3] in [-1, 1]); an empty label takes no room."""
    images = [(label, to_uint8(pictures)) for label, pictures in rows]
    width = max(sum(p.shape[1] * scale + GAP for p in pictures) for _, pictures in images)
    height = sum(
        pictures.shape[1] * scale + GAP + (LABEL_HEIGHT if label else 0) for label, pictures in images
    )
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    y = 0
    for label, pictures in images:
        if label:
            pen.text((2, y + 1), label, fill="black")
            y += LABEL_HEIGHT
        x = 0
        for picture in pictures:
            image = Image.fromarray(picture)
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            sheet.paste(image, (x, y))
            x += image.width + GAP
        y += pictures.shape[1] * scale + GAP
    return sheet


def save_sheet(rows: Sequence[tuple[str, ArrayLike]], path: Path, *, scale: int = 1) -> None:
    """Writes `contact_sheet` as PNG, never half a file. Raises UserError."""
    with replacing(Path(path)) as part:
        contact_sheet(rows, scale=scale).save(part, format="PNG")
