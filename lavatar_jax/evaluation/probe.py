"""Reads mouth, lids and head pose from pictures of a known identity, drawn or generated.

The probe of an identity is calibrated on drawings of that identity in random poses, degraded like generated
frames (blur, colour shifts, blotches, noise). It first finds the head, then looks at mouth and eyes in the
head's own coordinates, so that sway does not disturb it. All maps are linear: they cannot follow a generated
video further than the pictures justify.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lavatar_jax.data.faces import Identity, Motion, render
from lavatar_jax.data.faces_render import PARALLAX

Array = jax.Array
Floats = NDArray[np.float32]

COARSE = 32  # the head is first looked for in a picture of this size
POSE_SPREAD = (0.09, 0.05, 0.13)  # head x, y, roll: the largest sway that is calibrated
POSE_ERROR = (0.012, 0.010, 0.025)  # of the first estimate, which the refinement must expect
REFINEMENTS = 2
RIDGE = 1e-4  # regularisation, as a share of the pictures' total variance
CHUNK = 64  # frames handled at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What the probe saw; fields [T], units as in `Motion`."""

    mouth_open: Floats
    smile: Floats
    blink: Floats
    head_x: Floats
    head_y: Floats
    roll: Floats


def random_poses(key: Array, count: int) -> Motion:
    """Independent poses [count] that cover everything a talking head does."""
    keys = iter(jax.random.split(key, 16))

    def uniform(low: float, high: float) -> Array:
        return jax.random.uniform(next(keys), (count,), minval=low, maxval=high)

    x, y, roll = POSE_SPREAD
    return Motion(
        mouth_open=jnp.clip(uniform(-0.3, 1.05), 0.0, 1.0),
        mouth_width=jnp.clip(uniform(0.15, 1.0), 0.0, 1.0),
        smile=uniform(-0.2, 1.0),
        blink=jnp.clip(uniform(-1.0, 1.2), 0.0, 1.0),
        gaze_x=uniform(-0.8, 0.8),
        gaze_y=uniform(-0.8, 0.8),
        brow=uniform(-0.8, 0.8),
        head_x=uniform(-x, x),
        head_y=uniform(-y, y),
        roll=uniform(-roll, roll),
    )


def degrade(key: Array, video: Array) -> Array:
    """Blurs, tints, blotches and grains pictures [T, H, W, 3], each by random amounts."""
    count, height, width, _ = video.shape
    keys = jax.random.split(key, 6)
    half = jax.image.resize(video, (count, height // 2, width // 2, 3), "linear")
    blurred = jax.image.resize(half, video.shape, "linear")
    video = video + jax.random.uniform(keys[0], (count, 1, 1, 1)) * (blurred - video)
    video = video * jax.random.uniform(keys[1], (count, 1, 1, 3), minval=0.92, maxval=1.08)
    video = video + jax.random.uniform(keys[2], (count, 1, 1, 3), minval=-0.06, maxval=0.06)
    blotches = jax.random.normal(keys[3], (count, 8, 8, 3)) * 0.05
    video = video + jax.random.uniform(keys[4], (count, 1, 1, 1)) * jax.image.resize(
        blotches, video.shape, "linear"
    )
    return video + 0.03 * jax.random.normal(keys[5], video.shape)


def crop_face(
    video: Array, identity: Identity, pose: Array, window: tuple[float, ...], shape: tuple[int, int]
) -> Array:
    """Samples a window of the face, upright and centred whatever the pose.

    Args:
        video: [T, H, W, 3].
        pose: [T, 3]: head x, y, roll.
        window: left, right, top, bottom in feature coordinates (relative to the head's centre, in head
        units). shape: rows and columns of the result.

    Returns:
        [T, rows, columns, 3].
    """
    rows, columns = shape
    left, right, top, bottom = window
    u, v = jnp.meshgrid(jnp.linspace(left, right, columns), jnp.linspace(top, bottom, rows))

    def one(picture: Array, pose: Array) -> Array:
        x, y, roll = pose
        head_x, head_y = u + PARALLAX * x, v + PARALLAX * y
        cos, sin = jnp.cos(roll), jnp.sin(roll)
        picture_x = identity.head_scale * (cos * head_x - sin * head_y) + identity.head_x + x
        picture_y = identity.head_scale * (sin * head_x + cos * head_y) + identity.head_y + y
        size = picture.shape[0]
        at = [(along + 1.0) * 0.5 * size - 0.5 for along in (picture_y, picture_x)]
        sample = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=at, order=1, mode="nearest")
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(picture)

    return jax.vmap(one)(video, pose)


@jax.jit
def _views(video: Array, identity: Identity, pose: Array) -> tuple[Array, Array, Array]:
    """Head, mouth and eyes of pictures in the given poses, each [T, pixels]."""
    head = crop_face(video, identity, pose, (-0.5, 0.5, -0.55, 0.6), (36, 32))
    mouth = crop_face(video, identity, pose, (-0.27, 0.27, 0.14, 0.56), (26, 26))
    eyes = crop_face(video, identity, pose, (-0.33, 0.33, -0.22, 0.06), (20, 44))
    return tuple(view.reshape(len(view), -1) for view in (head, mouth, eyes))  # type: ignore[return-value]


@jax.jit
def _coarse(video: Array) -> Array:
    """Small pictures [T, pixels]."""
    small = jax.image.resize(video, (len(video), COARSE, COARSE, 3), "linear")
    return small.reshape(len(video), -1)


@jax.jit
def _calibration_views(
    key: Array, video: Array, identity: Identity, pose: Array
) -> tuple[Array, Array, Array, Array]:
    video = degrade(key, video)
    return _coarse(video), *_views(video, identity, pose)


@functools.partial(jax.jit, static_argnames="size")
def _draw(identity: Identity, motion: Motion, size: int) -> Array:
    return render(identity, motion, size)


@dataclasses.dataclass(frozen=True)
class _Linear:
    """A ridge regression from pictures to numbers."""

    mean: Floats
    weight: Floats  # [pixels, outputs]
    bias: Floats

    @classmethod
    def fit(cls, pictures: ArrayLike, targets: ArrayLike) -> _Linear:
        x, y = np.asarray(pictures, np.float64), np.asarray(targets, np.float64)
        mean, bias = x.mean(axis=0), y.mean(axis=0)
        x = x - mean
        gram = x @ x.T  # there are fewer pictures than pixels
        dual = np.linalg.solve(gram + RIDGE * np.trace(gram) * np.eye(len(x)), y - bias)
        return cls(mean.astype(np.float32), (x.T @ dual).astype(np.float32), bias.astype(np.float32))

    def __call__(self, pictures: ArrayLike) -> Floats:
        centred = np.asarray(pictures, np.float32) - self.mean
        return np.asarray(centred @ self.weight + self.bias, np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceProbe:
    """Measures faces of one identity; make it with `calibrate`."""

    identity: Identity
    find: _Linear
    refine: _Linear
    mouth: _Linear  # openness, smile
    lids: _Linear

    @classmethod
    def calibrate(cls, identity: Identity, size: int, *, count: int = 640, seed: int = 0) -> FaceProbe:
        """Learns to read `identity` from `count` drawings of `size` pixels (a few seconds)."""
        keys = jax.random.split(jax.random.key(seed), 3)
        motion = random_poses(keys[0], count)
        truth = np.stack([motion.head_x, motion.head_y, motion.roll], axis=1)
        noise = np.random.default_rng(seed).standard_normal((count, 3)) * POSE_ERROR
        # Half of the pictures are seen with the error of the first estimate, half with a small one.
        noise[::2] *= 0.2
        seen: list[list[Floats]] = [[], [], [], []]  # coarse pictures, heads, mouths, eyes
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            pictures = _draw(identity, jax.tree.map(lambda field, part=part: field[part], motion), size)
            pose = jnp.asarray(truth[part] + noise[part], jnp.float32)
            views = _calibration_views(jax.random.fold_in(keys[1], start), pictures, identity, pose)
            for collected, view in zip(seen, views, strict=True):
                collected.append(np.asarray(view))
        coarse, head, mouth, eyes = (np.concatenate(views) for views in seen)
        small = np.arange(count) % 2 == 0
        expression = np.stack([motion.mouth_open, motion.smile], axis=1)
        return cls(
            identity=identity,
            find=_Linear.fit(coarse, truth),
            refine=_Linear.fit(head, -noise),
            mouth=_Linear.fit(mouth[small], expression[small]),
            lids=_Linear.fit(eyes[small], np.asarray(motion.blink)[small, None]),
        )

    def measure(self, video: Floats) -> Reading:
        """Reads every frame of a video [T, H, W, 3] in [-1, 1] of this identity."""
        parts = []
        for start in range(0, len(video), CHUNK):
            part = jnp.asarray(video[start : start + CHUNK])
            padded = jnp.pad(
                part, ((0, CHUNK - len(part)), (0, 0), (0, 0), (0, 0))
            )  # one shape: compiled once
            pose = self.find(np.asarray(_coarse(padded)))
            for _ in range(REFINEMENTS):
                head, _, _ = _views(padded, self.identity, jnp.asarray(pose))
                pose = pose + self.refine(np.asarray(head))
            _, mouth, eyes = _views(padded, self.identity, jnp.asarray(pose))
            numbers = np.concatenate(
                [self.mouth(np.asarray(mouth)), self.lids(np.asarray(eyes)), pose], axis=1
            )
            parts.append(numbers[: len(part)])
        opening, smile, blink, x, y, roll = np.concatenate(parts).astype(np.float32).T
        return Reading(mouth_open=opening, smile=smile, blink=blink, head_x=x, head_y=y, roll=roll)
