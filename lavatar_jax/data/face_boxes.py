"""Finding faces. A detector is a function from a picture uint8 [H, W, 3] to the boxes of all faces in it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lavatar_jax.data.clip_filters import Box
from lavatar_jax.errors import UserError

Detector = Callable[[NDArray[np.uint8]], list[Box]]

WIDEST = 640  # pixels that are looked at: finding a face of a tenth of the height needs no more
SMALLEST, LEAST = 0.08, 20  # a face: of the height, pixels of what is looked at


def load_detector(name: str) -> Detector:
    """By name: "haar" (OpenCV), "any" (the whole picture is taken as one face), or "module:function".

    Raises UserError.
    """
    if name == "any":
        return whole_picture
    if name == "haar":
        return haar_detector()
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError):
        raise UserError(
            f"no face detector {name}: give haar, any, or the module:function of your own"
        ) from None


def whole_picture(picture: NDArray[np.uint8]) -> list[Box]:
    """For videos that are known to show one face, which fills half of the height."""
    height, width = picture.shape[:2]
    side = 0.5 * min(height, width)
    return [Box(0.5 * (width - side), 0.45 * height - 0.5 * side, side, side)]


def haar_detector() -> Detector:
    """Frontal faces by the Haar cascade that comes with OpenCV. Raises UserError where that is missing.

    It misses tilted heads and sometimes sees faces in patterns; the shares in `FilterConfig` allow for both.
    """
    try:
        import cv2
    except ImportError:
        raise UserError(
            "finding faces needs OpenCV: pip install 'lavatar-jax[data]', or give --faces any"
        ) from None
    cascades = Path(cv2.__file__).parent / "data"
    cascade = cv2.CascadeClassifier(str(cascades / "haarcascade_frontalface_alt2.xml"))

    def detect(picture: NDArray[np.uint8]) -> list[Box]:
        scale = min(1.0, WIDEST / picture.shape[1])
        if scale * min(picture.shape[:2]) < LEAST:
            return []  # nothing would be left of its other side
        grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        least = max(LEAST, int(SMALLEST * grey.shape[0]))
        found = cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=4, minSize=(least, least))
        return [Box(*(float(value) / scale for value in box)) for box in found]

    return detect
