"""Who a cartoon person is: colours and geometry, drawn deterministically from an integer index."""

import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array

SPLITS = ("train", "heldout")

# From light to dark; an identity takes a uniform position on this line: dark is as frequent as light.
SKIN_TONES = (
    "fde4d3",
    "f6d2b3",
    "eebd95",
    "dca577",
    "c48a5c",
    "a97048",
    "8c5836",
    "6f432a",
    "563321",
    "43281c",
)
HAIR_COLOURS = (
    "17130f",
    "2b1c12",
    "43291a",
    "5f3a1f",
    "7c4a22",
    "8f3318",
    "b6491c",
    "c99146",
    "e2bd6a",
    "f0dfb0",
    "8d8d90",
    "d5d3d0",
    "31468f",
    "8a2f72",
    "b6577f",
    "2f6f5f",
)
IRIS_COLOURS = ("3b2313", "5a3719", "7b5a2b", "2f7d4f", "3d8f86", "2f62a8", "5b93c7", "6b7f8c")
SHIRT_COLOURS = (
    "2f4f86",
    "8f2f36",
    "2e6b4b",
    "d8b348",
    "e9e4da",
    "33363d",
    "7d4f93",
    "d0743c",
    "5d9fb8",
    "a9c05a",
    "c77d92",
    "77583f",
)
BACKGROUND_COLOURS = (
    "7fa3bd",
    "c9b394",
    "93ad8b",
    "b493a8",
    "5f7691",
    "d9cfc0",
    "8c7f73",
    "6f9a97",
    "c98f76",
    "4b5568",
    "a8b7d1",
    "dcc27f",
)


def _rgb(codes: tuple[str, ...]) -> Array:
    return jnp.asarray([[int(c[i : i + 2], 16) / 255.0 for i in (0, 2, 4)] for c in codes], jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Identity:
    """A person, their clothes and room. Colours are [3] in [0, 1]; lengths in half picture widths."""

    # colours
    skin: Array
    hair: Array
    iris: Array
    lips: Array
    shirt: Array
    shirt_second: Array
    background_top: Array
    background_bottom: Array
    object_colours: Array  # [3, 3]: two discs and a picture frame
    glasses_colour: Array
    # head
    head_x: Array
    head_y: Array
    head_scale: Array
    head_width: Array
    head_height: Array
    jaw: Array  # how much the lower face narrows
    ear_size: Array
    neck_width: Array
    # features
    eye_y: Array
    eye_spacing: Array
    eye_width: Array
    eye_height: Array
    eye_slant: Array
    iris_size: Array
    brow_thickness: Array
    brow_arch: Array
    brow_height: Array
    nose_width: Array
    nose_length: Array
    mouth_y: Array
    mouth_width: Array
    lip_thickness: Array
    blush: Array
    freckles: Array
    beard: Array
    # hair
    hair_present: Array
    hair_volume: Array
    hair_curl: Array
    hair_length: Array  # of the part behind the head, below the head's centre; negative for none
    hairline: Array
    hairline_curve: Array
    hairline_tilt: Array
    bun: Array
    # glasses
    glasses: Array
    glasses_square: Array
    # clothes: strengths in [0, 1] of each pattern
    shoulder_width: Array
    neckline: Array
    stripes: Array
    stripe_angle: Array
    straps: Array
    # room
    gradient_angle: Array
    object_places: Array  # [3, 3]: x, y, size
    objects_present: Array  # [3]


def draw_identity(index: Array | int, split: str = "train") -> Identity:
    """The identity number `index` of a split. The splits never share a person. Can be traced and vmapped.

    Raises:
        ValueError: for an unknown split.
    """
    key = jax.random.fold_in(jax.random.key(7001 + SPLITS.index(split)), index)
    draws = jax.random.uniform(key, (256,))  # handed out one after the other
    position = itertools.count()

    def uniform(low: float, high: float, shape: tuple[int, ...] = ()) -> Array:
        values = jnp.stack([draws[next(position)] for _ in range(math.prod(shape))]).reshape(shape)
        return low + (high - low) * values

    def flag(probability: float) -> Array:
        return (uniform(0.0, 1.0) < probability).astype(jnp.float32)

    def choose(codes: tuple[str, ...], jitter: float = 0.06) -> Array:
        colour = _rgb(codes)[jnp.floor(uniform(0.0, len(codes) - 1e-3)).astype(jnp.int32)]
        return jnp.clip(colour * uniform(0.85, 1.12) + uniform(-jitter, jitter, (3,)), 0.02, 0.98)

    # Skin: a uniform place on the light-to-dark line.
    tones = _rgb(SKIN_TONES)
    place = uniform(0.0, len(SKIN_TONES) - 1.001)
    low = jnp.floor(place).astype(jnp.int32)
    skin = tones[low] + (place - low) * (tones[low + 1] - tones[low])
    skin = jnp.clip(skin + uniform(-0.02, 0.02, (3,)), 0.02, 0.98)

    red_lips = jnp.asarray([0.72, 0.22, 0.24])
    lips = skin * jnp.asarray([0.86, 0.58, 0.58]) + uniform(0.0, 0.45) * (red_lips - skin * 0.7)

    long_hair = flag(0.42)
    curly = flag(0.25)
    bangs = flag(0.35)
    background = choose(BACKGROUND_COLOURS)
    darker = jnp.clip(background * uniform(0.55, 1.2) + uniform(-0.08, 0.08, (3,)), 0.03, 0.97)
    beard = flag(0.16) * (1.0 - long_hair) * uniform(0.5, 0.85)
    # Discs to the left and right of the head, a picture frame in one of the upper corners.
    side = jnp.sign(uniform(-1.0, 1.0))
    places = jnp.stack(
        [
            jnp.stack([-side * uniform(0.6, 0.95), uniform(-0.9, -0.1), uniform(0.1, 0.26)]),
            jnp.stack([side * uniform(0.7, 1.0), uniform(-0.2, 0.4), uniform(0.06, 0.18)]),
            jnp.stack([side * uniform(0.68, 0.88), uniform(-0.8, -0.5), uniform(0.16, 0.26)]),
        ]
    )
    return Identity(
        skin=skin,
        hair=choose(HAIR_COLOURS, 0.03),
        iris=choose(IRIS_COLOURS, 0.03),
        lips=jnp.clip(lips, 0.05, 0.95),
        shirt=choose(SHIRT_COLOURS),
        shirt_second=choose(SHIRT_COLOURS),
        background_top=background,
        background_bottom=darker,
        object_colours=jnp.stack([choose(BACKGROUND_COLOURS), choose(SHIRT_COLOURS), choose(SHIRT_COLOURS)]),
        glasses_colour=choose(("1c1a1a", "3a2416", "6a1f27", "1f3357", "8a8a8e"), 0.03),
        head_x=uniform(-0.04, 0.04),
        head_y=uniform(-0.08, -0.02),
        head_scale=uniform(1.08, 1.2),
        head_width=uniform(0.405, 0.47),
        head_height=uniform(0.53, 0.59),
        jaw=uniform(0.05, 0.26),
        ear_size=uniform(0.85, 1.15),
        neck_width=uniform(0.15, 0.21),
        eye_y=uniform(-0.1, -0.05),
        eye_spacing=uniform(0.175, 0.205),
        eye_width=uniform(0.09, 0.115),
        eye_height=uniform(0.058, 0.085),
        eye_slant=uniform(-0.12, 0.12),
        iris_size=uniform(0.046, 0.058),
        brow_thickness=uniform(0.014, 0.028),
        brow_arch=uniform(0.01, 0.045),
        brow_height=uniform(0.13, 0.165),
        nose_width=uniform(0.045, 0.075),
        nose_length=uniform(0.1, 0.15),
        mouth_y=uniform(0.27, 0.31),
        mouth_width=uniform(0.155, 0.195),
        lip_thickness=uniform(0.026, 0.045),
        blush=uniform(0.0, 0.3),
        freckles=flag(0.15) * uniform(0.3, 0.6),
        beard=beard,
        hair_present=flag(0.93),
        hair_volume=uniform(0.03, 0.09) + 0.05 * curly,
        hair_curl=curly * uniform(0.5, 1.0),
        hair_length=jnp.where(long_hair > 0, uniform(0.25, 0.85), -1.0),
        hairline=jnp.where(bangs > 0, uniform(-0.29, -0.25), uniform(-0.4, -0.31)),
        hairline_curve=jnp.where(bangs > 0, uniform(0.1, 0.6), uniform(0.4, 1.5)),
        hairline_tilt=uniform(-0.3, 0.3),
        bun=flag(0.14),
        glasses=flag(0.28),
        glasses_square=flag(0.4),
        shoulder_width=uniform(0.62, 0.86),
        neckline=uniform(0.0, 0.2),
        stripes=flag(0.3),
        stripe_angle=uniform(-0.6, 0.6) + 1.5708 * flag(0.4),
        straps=flag(0.25),
        gradient_angle=uniform(-0.7, 0.7),
        object_places=places,
        objects_present=jnp.stack([flag(0.6), flag(0.5), flag(0.4)]),
    )
