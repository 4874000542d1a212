"""Writing result files: checked before the work starts, never left half-written, errors told in one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from lavatar_jax.errors import UserError
from lavatar_jax.files import replacing, temporary_name, write_errors


def check_output(path: str | Path, suffix: str) -> Path:
    """Says now what would go wrong after minutes of work. Raises UserError."""
    path = Path(path)
    with write_errors(path):
        if path.is_dir():
            raise UserError(
                f"{path} is a folder; give the name of a file, such as {path / f'avatar{suffix}'}"
            )
        if path.suffix.lower() != suffix:
            raise UserError(f"{path}: the output is a {suffix} file; give a name that ends so")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; create it first")
        if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise UserError(f"{path}: not allowed to write there")
        temporary_name(path).exists()  # whose name is longer
    return path


def write_png(path: Path, image: np.ndarray) -> None:
    """Saves uint8 [H, W, 3], atomically. Raises UserError."""
    with replacing(path) as part:
        Image.fromarray(image).save(part, format="PNG")
