"""Numbers that say how good a talking face is: lip-sync, identity, liveliness, and pictures.

Videos are [T, H, W, 3] in [-1, 1] at 25 frames per second; openness and blink tracks are [T].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lavatar_jax.data.faces import REGIONS, Identity, Motion, neutral_motion, region_masks, render
from lavatar_jax.data.faces_render import head_frame
from lavatar_jax.data.motion import FRAMES_PER_SECOND, Manner
from lavatar_jax.evaluation.probe import Reading

Floats = NDArray[np.float32]

COLOUR_REGIONS = ("skin", "hair", "background", "shirt")


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Pearson correlation; 0 if one of the tracks never changes."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 1e-12 else 0.0


def lag_correlations(measured: ArrayLike, truth: ArrayLike, most: int = 3) -> dict[int, float]:
    """Correlation by lag in frames; a positive lag means that the measured track comes late."""
    measured, truth = np.asarray(measured), np.asarray(truth)
    count = len(truth)
    result = {}
    for lag in range(-most, most + 1):
        late = slice(max(lag, 0), count + min(lag, 0))
        early = slice(max(-lag, 0), count + min(-lag, 0))
        result[lag] = correlation(measured[late], truth[early])
    return result


def peak_lag(measured: Sequence[ArrayLike], truth: Sequence[ArrayLike], most: int = 3) -> int:
    """The lag in frames with the highest correlation averaged over clips."""
    tables = [lag_correlations(m, t, most) for m, t in zip(measured, truth, strict=True)]
    return max(tables[0], key=lambda lag: float(np.mean([table[lag] for table in tables])))


def shuffled_correlation(measured: Sequence[ArrayLike], truth: Sequence[ArrayLike]) -> float:
    """Mean correlation with the openness of *other* clips of the same length: about 0 for a fair probe."""
    pairs = [correlation(m, t) for i, m in enumerate(measured) for j, t in enumerate(truth) if i != j]
    return float(np.mean(pairs)) if pairs else 0.0


def variance_ratio(measured: ArrayLike, truth: ArrayLike) -> float:
    """Variance of the mouth's opening against the truth's; well below 1 is dynamic collapse."""
    return float(np.var(np.asarray(measured)) / max(float(np.var(np.asarray(truth))), 1e-9))


def count_blinks(blink: ArrayLike, high: float = 0.6, low: float = 0.3) -> int:
    """Blinks in a lid track [T]: rises above `high` after having been below `low`."""
    count, closed = 0, False
    for value in np.asarray(blink):
        if not closed and value > high:
            count, closed = count + 1, True
        elif closed and value < low:
            closed = False
    return count


def blinks_per_minute(blink: ArrayLike) -> float:
    track = np.asarray(blink)
    return count_blinks(track) * 60.0 * FRAMES_PER_SECOND / max(len(track), 1)


def head_deviation(reading: Reading | Motion) -> float:
    """Standard deviation of the head's position, in half picture widths (roll acts at distance 0.3)."""
    tracks = (np.asarray(reading.head_x), np.asarray(reading.head_y), 0.3 * np.asarray(reading.roll))
    return float(np.sqrt(sum(float(np.var(track)) for track in tracks)))


def head_activity(reading: Reading | Motion, span: int = 8) -> float:
    """Root mean square shift of the head over `span` frames: needs less video than the deviation."""
    tracks = (np.asarray(reading.head_x), np.asarray(reading.head_y), 0.3 * np.asarray(reading.roll))
    span = min(span, len(tracks[0]) - 1)
    return float(np.sqrt(sum(float(np.mean((track[span:] - track[:-span]) ** 2)) for track in tracks)))


# Halfway (geometrically, for activity) between the manners of `motion`, as 150 true clips of 10 s of the
# training split have them (0.0031, 0.0124 and 0.0389; people of any two manners do not overlap).
SMILE_THRESHOLD = 0.45
ACTIVITY_THRESHOLDS = (0.0062, 0.022)


def recognise_manner(reading: Reading | Motion) -> Manner:
    """The manner of talking that a video shows; needs some seconds of it."""
    level = sum(head_activity(reading) > threshold for threshold in ACTIVITY_THRESHOLDS)
    smile = "smiling" if float(np.mean(np.asarray(reading.smile))) > SMILE_THRESHOLD else "neutral"
    return Manner(smile=smile, head=("still", "normal", "lively")[level])


def sharpness(video: Floats) -> float:
    """Mean strength of the finest edges: absolute second differences of the brightness, along x and y."""
    grey = np.asarray(video, np.float32).mean(axis=-1)
    along_x = np.abs(2.0 * grey[:, :, 1:-1] - grey[:, :, :-2] - grey[:, :, 2:]).mean()
    along_y = np.abs(2.0 * grey[:, 1:-1] - grey[:, :-2] - grey[:, 2:]).mean()
    return float(along_x + along_y)


def psnr(video: Floats, truth: Floats, weights: Floats | None = None) -> float:
    """Peak signal to noise ratio in dB for values in [-1, 1]; weights (`mouth_box`) broadcast."""
    error = np.square(np.asarray(video, np.float64) - np.asarray(truth, np.float64))
    shares = np.broadcast_to(np.ones(1) if weights is None else np.asarray(weights, np.float64), error.shape)
    return float(10.0 * np.log10(4.0 / max(float((error * shares).sum() / shares.sum()), 1e-12)))


@functools.partial(jax.jit, static_argnames="size")
def mouth_box(identity: Identity, motion: Motion, size: int) -> jax.Array:
    """Mask [T, size, size, 1] of the box around mouth and chin, following the head."""

    def one(pose: Motion) -> jax.Array:
        frame = head_frame(identity, pose, size)
        inside = (jnp.abs(frame.feature_x) < 0.25) & (
            jnp.abs(frame.feature_y - identity.mouth_y - 0.07) < 0.17
        )
        return inside[..., None].astype(jnp.float32)

    return jax.vmap(one)(motion)


@functools.partial(jax.jit, static_argnames="size")
def colour_cores(identity: Identity, size: int) -> tuple[jax.Array, jax.Array]:
    """Pixels that show the same region wherever the head sways, and their true colours.

    Returns:
        masks [size, size, 4] of `COLOUR_REGIONS` (a bald person's hair is empty) and mean colours [4, 3] in
        [-1, 1].
    """
    x, y, roll = (
        grid.reshape(-1) for grid in jnp.meshgrid(*(jnp.linspace(-a, a, 3) for a in (0.05, 0.025, 0.06)))
    )
    rest = neutral_motion(len(x))
    # The mouth opens and the eyes close in some of the poses, so that neither belongs to the skin.
    poses = Motion(**{**vars(rest), "head_x": x, "head_y": y, "roll": roll, "mouth_open": (x > 0) * 1.0})
    regions = jnp.asarray([REGIONS.index(name) for name in COLOUR_REGIONS])
    masks = jnp.min(region_masks(identity, poses, size)[..., regions], axis=0) > 0.97
    weights = masks.astype(jnp.float32)
    picture = render(identity, poses, size).mean(axis=0)
    colours = jnp.einsum("hwr,hwc->rc", weights, picture) / jnp.maximum(weights.sum((0, 1)), 1.0)[:, None]
    return weights, colours


def colour_error(video: Floats, identity: Identity) -> dict[str, Floats]:
    """How far the mean colour of each region is from the identity's true one, in levels of 255.

    Averaged over the three channels, for every frame: region -> [T]. Regions of fewer than 20 pixels are left
    out.
    """
    weights, colours = (np.asarray(a) for a in colour_cores(identity, video.shape[1]))
    result = {}
    for i, name in enumerate(COLOUR_REGIONS):
        if weights[..., i].sum() >= 20:
            mean = np.einsum("hw,thwc->tc", weights[..., i], video) / weights[..., i].sum()
            result[name] = np.abs(mean - colours[i]).mean(axis=-1).astype(np.float32) * 127.5
    return result


def flicker(video: Floats, identity: Identity) -> float:
    """Mean change of the background from frame to frame, in levels of 255: it never moves, so 0 is true."""
    weights, _ = colour_cores(identity, video.shape[1])
    still = np.asarray(weights)[..., COLOUR_REGIONS.index("background")] > 0
    return float(np.abs(np.diff(np.asarray(video, np.float32)[:, still], axis=0)).mean()) * 127.5
