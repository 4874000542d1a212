"""The faces one can choose from: bundled, and those of a folder."""

from __future__ import annotations

import dataclasses
import functools
import io
import re
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lavatar_jax.errors import UserError
from lavatar_jax.inference.images import cover_and_crop, load_image

BUNDLED = Path(__file__).parents[1] / "samples"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NAMES = {"face": "Sam"}  # of files that are not called as one calls a person
THUMBNAIL = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Face:
    id: str
    name: str
    pixels: UInt8[np.ndarray, "H W 3"] = dataclasses.field(repr=False)
    png: bytes = dataclasses.field(repr=False)
    thumbnail: bytes = dataclasses.field(repr=False)

    def about(self) -> dict[str, object]:
        """As clients see it."""
        height, width = self.pixels.shape[:2]
        where = f"/v1/faces/{self.id}"
        about: dict[str, object] = {"id": self.id, "name": self.name, "width": width, "height": height}
        return about | {"thumbnail": f"{where}/thumbnail", "image": f"{where}/image"}


def load_faces(folder: Path | None = None) -> dict[str, Face]:
    """By id, the bundled ones first. Raises UserError for a folder without pictures, or two of one id."""
    bundled = [BUNDLED / "face.png", *sorted((BUNDLED / "faces").glob("*.png"))]
    own = []
    if folder is not None:
        own = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
        if not own:
            raise UserError(
                f"{folder}: there is no picture in it; give a folder with PNG, JPEG or WebP files"
            )
    faces = {face.id: face for face in map(_load_once, bundled)}
    named: dict[str, str | Path] = dict.fromkeys(faces, "a face that comes with lavatar_jax")
    for path in own:
        face = _load(path)
        if face.id in faces:
            where = named[face.id]
            raise UserError(f"{path}: its id would be {face.id}, which {where} has already; rename the file")
        faces[face.id], named[face.id] = face, path
    return faces


@functools.cache
def _load_once(path: Path) -> Face:
    return _load(path)


def _load(path: Path) -> Face:
    pixels = load_image(path)
    name = NAMES.get(path.stem) or path.stem.replace("_", " ").replace("-", " ").strip() or "face"
    return Face(
        id=re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-") or "face",
        name=name[:1].upper() + name[1:],
        pixels=pixels,
        png=_png(pixels),
        thumbnail=_png(cover_and_crop(pixels, THUMBNAIL, THUMBNAIL)),
    )


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()
