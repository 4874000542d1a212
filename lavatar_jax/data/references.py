"""Pictures that stand for a person beside their clip: portraits, and ones that differ from it on purpose.

Reference perturbation (method section 6): a model that always sees the reference in the clip's own pose and
light learns to copy it, and its motion dies. So the reference keeps who it is and may change everything else.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from lavatar_jax.data.faces import Identity, Motion, draw_identity, neutral_motion, render

_render = jax.jit(render, static_argnames="size")
_draw = jax.jit(draw_identity)

# What a snapshot may show (`Motion`); the eyes stay open enough to tell their colour.
POSES = {
    "mouth_open": (0.0, 0.6),
    "mouth_width": (0.2, 0.8),
    "smile": (-0.2, 0.9),
    "blink": (0.0, 0.2),
    "gaze_x": (-0.6, 0.6),
    "gaze_y": (-0.4, 0.4),
    "brow": (-0.5, 0.5),
    "head_x": (-0.06, 0.06),
    "head_y": (-0.03, 0.03),
    "roll": (-0.1, 0.1),
}


def portrait_pose(random: np.random.Generator) -> Motion:
    """The pose of a portrait photo [1]: nearly neutral, looking at the viewer."""
    x, y, roll, smile = random.uniform(-1.0, 1.0, (4, 1)).astype(np.float32)
    return dataclasses.replace(
        neutral_motion(1),
        head_x=jnp.asarray(0.02 * x), head_y=jnp.asarray(0.01 * y), roll=jnp.asarray(0.03 * roll),
        smile=jnp.asarray(0.15 + 0.15 * smile),
    )  # fmt: skip


def snapshot_pose(random: np.random.Generator) -> Motion:
    """Any pose [1] of a person who talks and moves."""
    return Motion(
        **{name: jnp.asarray(random.uniform(*span, 1), jnp.float32) for name, span in POSES.items()}
    )


def other_room(identity: Identity, random: np.random.Generator) -> Identity:
    """The same person and clothes before another background."""
    other = _draw(int(random.integers(1_000_000)))
    return dataclasses.replace(
        identity,
        background_top=other.background_top,
        background_bottom=other.background_bottom,
        object_colours=other.object_colours,
    )


def other_light(picture: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.float32]:
    """A picture [H, W, 3] in [-1, 1] brighter or darker, warmer or colder, and lit from one side."""
    brightness = random.uniform(0.75, 1.2)
    warmth = random.uniform(-0.08, 0.08) * np.array([1.0, 0.0, -1.0])
    side = random.uniform(-0.2, 0.2) * np.linspace(-1.0, 1.0, picture.shape[1])[None, :, None]
    lit = (0.5 + 0.5 * picture) * brightness * (1.0 + warmth) * (1.0 + side)
    return (2.0 * np.clip(lit, 0.0, 1.0) - 1.0).astype(np.float32)


def snapshot(
    identity: Identity, size: int, random: np.random.Generator, *, scene: bool
) -> NDArray[np.float32]:
    """The person [size, size, 3] in another pose; with `scene` in another room and light too."""
    pose = snapshot_pose(random)
    if not scene:
        return np.asarray(_render(identity, pose, size=size))[0]
    return other_light(np.asarray(_render(other_room(identity, random), pose, size=size))[0], random)
