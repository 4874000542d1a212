"""Reading a reference image safely, and giving it the size that a model wants."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lavatar_jax.errors import UserError
from lavatar_jax.inference.inputs import check_input

MAX_PIXELS = 100_000_000  # a 100-megapixel photo is real, a larger one is more likely a bomb
MOST_STRETCHED = 300  # times as long as wide
FORMATS = "PNG, JPEG, WebP, GIF, BMP or TIFF"
DIVISOR = 64  # sides of a video: 8x by the VAE, 2x by the patches, 4x by the coarsest motion tokens


def load_image(path: str | Path) -> np.ndarray:
    """Any common image file as uint8 [H, W, 3], upright (EXIF), transparency laid on white.

    Raises UserError if the file is missing, empty, a folder, no image, truncated or too large; the number of
    pixels is checked before any is decoded.
    """
    path = check_input(path, "image", FORMATS)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        limit = f"{MAX_PIXELS // 10**6} million pixels"
        raise UserError(f"{path}: image of more than {limit}; make it smaller first") from None
    except Exception:  # decoders fail on damaged data in every way; what they say does not help a user
        raise UserError(f"{path} is not an image, or is damaged; give a complete {FORMATS} file") from None


def to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels of any mode as uint8 [H, W, 3], transparency laid on white."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits or float: PIL would clip instead of scale
        values = np.nan_to_num(np.asarray(image, np.float32))
        full = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1e-6)
        grey = np.clip(values * (255.0 / full), 0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def size_less_than_area(height: int, width: int, max_area: int) -> tuple[int, int]:
    """The (height, width) of the video for an image: multiples of 64, at most `max_area` pixels.

    The image is never enlarged, but its scaled sides are rounded *up*. The reference tries 100 scales from
    the largest possible one downwards and takes the first that fits; a finer search would sometimes find a
    slightly larger size, so the step is part of the behaviour.
    Raises UserError if no size fits (an image of extreme proportions).
    """
    if height * width <= max_area:
        largest, smallest = 1.0, 0.1
    else:
        largest = math.sqrt(max_area / (height * width))
        # Around the scale where (h s + 63)(w s + 63) = max_area, that is where any rounding fits.
        # The reference's root has 2ac where a quadratic equation has 4ac; it only lowers the start.
        a, b, c = height * width, (DIVISOR - 1) * (height + width), (DIVISOR - 1) ** 2 - max_area
        smallest = (math.sqrt(b * b - 2 * a * c) - b) / (2 * a)
    for i in range(100):
        scale = largest - (largest - smallest) * i / 100
        fitted_height, fitted_width = (_round_up(int(side * scale)) for side in (height, width))
        if 0 < fitted_height * fitted_width <= max_area:
            return fitted_height, fitted_width
    raise UserError(f"an image of {width}x{height} cannot be fitted into {max_area} pixels; crop it first")


def _round_up(side: int) -> int:
    return -(-side // DIVISOR) * DIVISOR


def video_size(image: np.ndarray, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the video for an image [H, W, 3]: `image_size` of the model's configuration is a
    fixed square, or the sides of the largest area (`size_less_than_area`)."""
    _check_proportions(image)
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image.shape[:2]
    return size_less_than_area(height, width, math.prod(image_size))


def _check_proportions(image: np.ndarray) -> None:
    """Raises UserError for what would be scaled to gigabytes before it is cropped."""
    height, width = image.shape[:2]
    if max(height, width) > MOST_STRETCHED * min(height, width):
        raise UserError(f"an image of {width}x{height} is too long and narrow; crop it first")


def resize_and_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The reference's preprocessing: short side to min(height, width), then a centre crop; uint8 [h, w, 3].

    Where the long side comes out too short, black is added on both sides.
    """
    old_height, old_width = image.shape[:2]
    short, target = min(old_height, old_width), min(height, width)
    new_height, new_width = int(target * old_height / short), int(target * old_width / short)
    resized = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR))
    missing = [(max(0, want - have)) for want, have in ((height, new_height), (width, new_width))]
    padded = np.pad(resized, [*((n // 2, n - n // 2) for n in missing), (0, 0)])
    return _centre_crop(padded, height, width)


def cover_and_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales the image so that it covers height x width, and crops the centre; uint8 [height, width, 3].

    For models of one fixed size: no black bars, whatever the proportions of the photo.
    """
    _check_proportions(image)
    old_height, old_width = image.shape[:2]
    scale = max(height / old_height, width / old_width)
    new_height, new_width = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.LANCZOS)
    return _centre_crop(np.asarray(resized), height, width)


def _centre_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]
