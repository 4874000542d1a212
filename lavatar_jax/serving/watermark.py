"""An invisible mark that says "made by a model", and how to find it again without the unmarked video.

Spread spectrum (Cox et al. 1997): a key chooses a sign for each of some 7,000 middle frequencies of the
picture, and the sum of these waves, one grey level strong, is added to the frames. Each wave is far below
what is seen or what H.264 keeps of noise; all of them together are unmistakable to who knows the signs.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from lavatar_jax.errors import UserError

PUBLIC_KEY = b"lavatar-jax"  # whoever has the program can find this mark, and also remove it
GRID = 128  # the detector sees this many rows and columns of any video, so that scaling is harmless
LOWEST, HIGHEST = 16, 96  # half waves a picture; below are the shapes of the face, above what H.264 drops
LIMITED = 219 / 255  # luma of videos spans so much of a byte
FALSE_ALARM = 1e-6  # at most so many unmarked videos may be called marked
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """`score` is in standard deviations: about 0 +- 1 without the mark."""

    score: float
    false_alarm: float  # an unmarked video scores as high with at most this probability
    present: bool


@dataclass(frozen=True, kw_only=True)
class Watermark:
    """Marks frames, and finds the mark. `strength` is in grey levels (RMS) where the picture is smooth."""

    key: bytes = field(default=PUBLIC_KEY, repr=False)
    strength: float = 1.0

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """Marked copies of uint8 [T, H, W, 3]; the mark is stronger where the first frame is busy.

        It is the same in all frames: one that changes would flicker, and cost the encoder bits.
        Raises UserError for frames smaller than the finest waves need.
        """
        marked = np.empty_like(frames)
        if not len(frames):
            return marked
        height, width = frames.shape[1:3]
        if min(height, width) < GRID:
            raise UserError(f"frames of {width}x{height} are too small to be marked; enlarge them to {GRID}")
        change = self.strength * _visibility(frames[0]) * _pattern(self.key, height, width)
        levels = np.rint(change)[..., None].repeat(3, axis=-1)
        up, down = np.maximum(levels, 0).astype(np.uint8), np.maximum(-levels, 0).astype(np.uint8)
        for frame, out in zip(frames, marked, strict=True):
            out[:] = frame
            _add(out, up, down)
        return marked

    def embed_luma(self, planes: Sequence[np.ndarray]) -> None:
        """Marks the luma planes of a few frames in place: uint8 [H, W] of limited range, 16 to 235.

        The same as `embed`, where frames have been converted already: a third of the bytes.
        """
        if not planes:
            return
        height, width = planes[0].shape
        if min(height, width) < GRID:
            raise UserError(f"frames of {width}x{height} are too small to be marked; enlarge them to {GRID}")
        change = LIMITED * self.strength * _visibility(planes[0]) * _pattern(self.key, height, width)
        levels = np.rint(change).astype(np.int8)
        up, down = np.maximum(levels, 0).view(np.uint8), np.maximum(-levels, 0).view(np.uint8)
        for plane in planes:
            _add(plane, up, down)

    def detect(self, frames: Iterable[np.ndarray]) -> Detection:
        """Looks for the mark in frames uint8 [H, W, 3], or in a video [T, H, W, 3]."""
        return self.judge(coefficients(frames))

    def judge(self, values: np.ndarray) -> Detection:
        """What the `coefficients` of a video say about this key.

        Without the mark the signs have nothing to do with the values, so that their sum is one of random
        signs, whatever the video shows: Hoeffding's bound exp(-score^2 / 2) holds for any video.
        """
        norm = float(np.linalg.norm(values))
        score = float(values @ _signs(self.key)) / norm if norm else 0.0
        false_alarm = math.exp(-(max(score, 0.0) ** 2) / 2)
        return Detection(score=score, false_alarm=false_alarm, present=false_alarm <= FALSE_ALARM)


def _add(pixels: np.ndarray, up: np.ndarray, down: np.ndarray) -> None:
    """Saturating sums of bytes in place: no wider copies."""
    np.minimum(pixels, 255 - up, out=pixels)
    np.add(pixels, up, out=pixels)
    np.maximum(pixels, down, out=pixels)
    np.subtract(pixels, down, out=pixels)


def coefficients(frames: Iterable[np.ndarray]) -> np.ndarray:
    """The marked frequencies of a video, frames uint8 [H, W, 3], after edges are brought down: [waves]."""
    total, count = np.zeros((GRID, GRID), np.float32), 0
    for frame in frames:
        luma = Image.fromarray(frame @ LUMA).resize((GRID, GRID), Image.Resampling.BOX)
        total += _flatten(np.asarray(luma))
        count += 1
    return fft.dctn(total / max(count, 1), norm="ortho")[_band()]


def _flatten(luma: np.ndarray) -> np.ndarray:
    """Details [GRID, GRID] relative to how strong details are nearby: a hard edge hides nothing else."""
    details = luma - ndimage.uniform_filter(luma, 7)
    return details / (np.sqrt(_local_mean(details**2, 7)) + 1.0)


def _local_mean(squares: np.ndarray, size: int) -> np.ndarray:
    """Running sums of what is never negative; their rounding errors can be."""
    return np.maximum(ndimage.uniform_filter(squares, size), 0)


def _visibility(frame: np.ndarray) -> np.ndarray:
    """How much stronger the mark may be, [H, W] in 1..2: texture hides it. `frame`: RGB, or its luma."""
    height, width = frame.shape[:2]
    luma = np.asarray(Image.fromarray(frame).convert("L").resize((64, 64), Image.Resampling.BOX), np.float32)
    variance = ndimage.uniform_filter(luma**2, 3) - ndimage.uniform_filter(luma, 3) ** 2
    gain = np.clip(1 + np.sqrt(np.maximum(variance, 0)) / 16, 1, 2)
    return np.asarray(Image.fromarray(gain).resize((width, height), Image.Resampling.BILINEAR))


@functools.cache
def _band() -> np.ndarray:
    """Which of the frequencies [GRID, GRID] carry the mark."""
    radius = np.hypot(*np.meshgrid(np.arange(GRID), np.arange(GRID)))
    return (radius >= LOWEST) & (radius < HIGHEST)


@functools.lru_cache(maxsize=4)
def _signs(key: bytes) -> np.ndarray:
    """+1 or -1 for each wave, from a hash, so that no version of a random generator matters."""
    waves = int(_band().sum())
    digest = hashlib.shake_256(key).digest(-(-waves // 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=waves)
    return bits.astype(np.float32) * 2 - 1


@functools.lru_cache(maxsize=4)
def _pattern(key: bytes, height: int, width: int) -> np.ndarray:
    """The sum of the waves, [H, W] float32 of variance 1."""
    spectrum = np.zeros((GRID, GRID), np.float32)
    spectrum[_band()] = _signs(key)

    def waves(side: int) -> np.ndarray:
        return np.cos(np.pi * np.outer((np.arange(side) + 0.5) / side, np.arange(GRID))).astype(np.float32)

    pattern = waves(height) @ spectrum @ waves(width).T
    return pattern / pattern.std()
