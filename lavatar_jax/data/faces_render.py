"""Draws an `Identity` in a pose as a stack of flat-coloured, antialiased layers.

Every layer is (coverage map, colour, region). The picture is the stack composited from back to front; the
same stack with region indicators in place of the colours gives exact region masks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lavatar_jax.data.faces_identity import Identity
from lavatar_jax.data.shapes import box, circle, coverage, ellipse, lens, parabola, stroke

Array = jax.Array

REGIONS = ("background", "skin", "hair", "shirt", "mouth", "eyes", "other")
BACKGROUND, SKIN, HAIR, SHIRT, MOUTH, EYES, OTHER = range(len(REGIONS))

MOUTH_OPENING_UP, MOUTH_OPENING_DOWN = 0.045, 0.195  # travel of the lips at openness 1, in head units
PARALLAX = 0.3  # features move this much further than the head's outline: a hint of turning


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Motion:
    """The pose of a face; every field is a scalar, or [T] for a clip."""

    mouth_open: Array  # 0 closed .. 1
    mouth_width: Array  # 0 rounded .. 0.5 neutral .. 1 spread
    smile: Array  # -0.5 .. 1
    blink: Array  # 0 open .. 1 closed
    gaze_x: Array  # -1 .. 1
    gaze_y: Array
    brow: Array  # -1 .. 1, raised
    head_x: Array  # shift in half picture widths
    head_y: Array
    roll: Array  # radians, clockwise


def neutral_motion(frames: int | None = None) -> Motion:
    """The pose of a reference photo: mouth closed, eyes open, head upright. Fields are [] or [frames]."""
    shape = () if frames is None else (frames,)
    zero = jnp.zeros(shape)
    return Motion(
        mouth_open=zero,
        mouth_width=zero + 0.5,
        smile=zero + 0.1,
        blink=zero,
        gaze_x=zero,
        gaze_y=zero,
        brow=zero,
        head_x=zero,
        head_y=zero,
        roll=zero,
    )


class Layer(NamedTuple):
    alpha: Array  # [H, W]
    colour: Array  # [3]
    region: int


class Frame(NamedTuple):
    """Coordinates of all pixels [H, W] in picture, head and features, and the size of a pixel there."""

    x: Array
    y: Array
    pixel: float
    head_x: Array
    head_y: Array
    feature_x: Array
    feature_y: Array
    head_pixel: Array


def pixel_grid(size: int) -> tuple[Array, Array]:
    """Pixel centres in [-1, 1]: x [1, W] to the right, y [H, 1] downwards."""
    centres = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (2.0 / size) - 1.0
    return centres[None, :], centres[:, None]


def head_frame(identity: Identity, motion: Motion, size: int) -> Frame:
    x, y = pixel_grid(size)
    dx = x - identity.head_x - motion.head_x
    dy = y - identity.head_y - motion.head_y
    cos, sin = jnp.cos(motion.roll), jnp.sin(motion.roll)
    inverse_scale = 1.0 / identity.head_scale
    head_x = (cos * dx + sin * dy) * inverse_scale
    head_y = (cos * dy - sin * dx) * inverse_scale
    feature_x = head_x - PARALLAX * motion.head_x
    feature_y = head_y - PARALLAX * motion.head_y
    pixel = 2.0 / size
    return Frame(x, y, pixel, head_x, head_y, feature_x, feature_y, pixel * inverse_scale)


def _shade(colour: Array, factor: float) -> Array:
    return jnp.clip(colour * factor, 0.0, 1.0)


def _tint(colour: Array, amount: float) -> Array:
    return colour + amount * (1.0 - colour)


def _room(identity: Identity, frame: Frame) -> list[Layer]:
    x, y, pixel = frame.x, frame.y, frame.pixel
    ones = jnp.ones(jnp.broadcast_shapes(x.shape, y.shape))
    ramp = 0.5 + 0.45 * (y * jnp.cos(identity.gradient_angle) + x * jnp.sin(identity.gradient_angle))
    layers = [
        Layer(ones, identity.background_top, BACKGROUND),
        Layer(jnp.clip(ramp, 0.0, 1.0), identity.background_bottom, BACKGROUND),
    ]
    for i in range(2):
        cx, cy, radius = identity.object_places[i]
        alpha = coverage(circle(x - cx, y - cy, radius), pixel) * identity.objects_present[i]
        layers.append(Layer(0.85 * alpha, identity.object_colours[i], BACKGROUND))
    cx, cy, half = identity.object_places[2]
    outer = coverage(box(x - cx, y - cy, half, half * 0.8, 0.01), pixel) * identity.objects_present[2]
    inner = (
        coverage(box(x - cx, y - cy, half - 0.045, half * 0.8 - 0.045, 0.01), pixel)
        * identity.objects_present[2]
    )
    layers.append(Layer(outer, _shade(identity.object_colours[2], 0.6), BACKGROUND))
    layers.append(Layer(inner, _tint(identity.object_colours[2], 0.45), BACKGROUND))
    return layers


def _body(identity: Identity, motion: Motion, frame: Frame) -> tuple[list[Layer], list[Layer]]:
    """Shirt, then neck: the hair behind the head lies between the two."""
    x, y, pixel = frame.x - identity.head_x, frame.y, frame.pixel
    shirt = coverage(box(x, y - 1.28, identity.shoulder_width, 0.56, 0.34), pixel)
    across = x * jnp.cos(identity.stripe_angle) + y * jnp.sin(identity.stripe_angle)
    stripes = jnp.clip(0.5 + 2.5 * jnp.sin(26.0 * across), 0.0, 1.0) * identity.stripes
    straps = coverage(jnp.abs(jnp.abs(x) - 0.36) - 0.055, pixel) * identity.straps
    shadow = coverage(jnp.abs(x) - 0.3 * identity.shoulder_width, -0.5)
    shirt_layers = [
        Layer(shirt, identity.shirt, SHIRT),
        Layer(shirt * stripes, identity.shirt_second, SHIRT),
        Layer(shirt * straps, _shade(identity.shirt_second, 0.9), SHIRT),
        Layer(0.3 * shirt * shadow, _shade(identity.shirt, 0.4), SHIRT),
    ]
    # The neck joins the moving head to the resting shoulders.
    follow = jnp.clip((0.85 - y) * 2.0, 0.0, 1.0)
    neck_x = x - motion.head_x * follow
    width = identity.neck_width
    flare = jnp.maximum(y - 0.62, 0.0)
    column = jnp.maximum(jnp.abs(neck_x) - width - 1.2 * flare * flare, jnp.maximum(0.1 - y, y - 0.76))
    chest = ellipse(x, y - 0.74, width + 0.06, 0.07 + identity.neckline)
    neck = coverage(jnp.minimum(column, chest), pixel)
    chin = (
        frame.head_y - identity.head_height * (1.0 + 0.07 * motion.mouth_open) - 0.03 + 0.9 * frame.head_x**2
    )
    collar = coverage(jnp.abs(chest) - 0.018, pixel) * shirt * coverage(0.74 - y, pixel)
    neck_layers = [
        Layer(neck, _shade(identity.skin, 0.93), SKIN),
        Layer(0.75 * neck * coverage(chin - 0.02, 0.12), _shade(identity.skin, 0.68), SKIN),
        Layer(collar, _shade(identity.shirt, 0.72), SHIRT),
    ]
    return shirt_layers, neck_layers


def _hair_shapes(identity: Identity, frame: Frame) -> tuple[Array, Array]:
    """Coverage of the hair behind the head and of the hair on the forehead."""
    x, y, pixel = frame.head_x, frame.head_y, frame.head_pixel
    curl = 0.022 * identity.hair_curl * jnp.sin(34.0 * x) * jnp.sin(34.0 * y + 1.0)
    width, height = identity.head_width + identity.hair_volume, identity.head_height + identity.hair_volume
    cap = ellipse(x, y + 0.03, width, height) + curl
    bun = circle(x, y + height + 0.06, 0.15) + (1.0 - identity.bun)
    is_long = identity.hair_length > 0
    length = jnp.maximum(identity.hair_length, 0.1)
    fall = box(x, y - 0.5 * length, width + 0.1 * jnp.maximum(y, 0.0), 0.5 * length, 0.09) + curl
    back = jnp.minimum(jnp.minimum(cap, bun), jnp.where(is_long, fall, 1.0))
    back = jnp.where(is_long, back, jnp.maximum(back, y - 0.1))
    line = identity.hairline + identity.hairline_tilt * x + identity.hairline_curve * x * x
    front = jnp.maximum(jnp.maximum(cap, y - line - 2.0 * curl), y - 0.06)
    return (coverage(back, pixel) * identity.hair_present, coverage(front, pixel) * identity.hair_present)


def _head(identity: Identity, motion: Motion, frame: Frame) -> list[Layer]:
    x, y, pixel = frame.head_x, frame.head_y, frame.head_pixel
    long_hair = jnp.where(identity.hair_length > 0, identity.hair_present, 0.0)
    ear_x = jnp.abs(x) - identity.head_width + 0.005
    ears = coverage(ellipse(ear_x, y - 0.03, 0.06 * identity.ear_size, 0.105 * identity.ear_size), pixel)
    inner_ear = coverage(ellipse(ear_x - 0.012, y - 0.03, 0.028, 0.06), pixel)
    height = jnp.where(y > 0, identity.head_height * (1.0 + 0.07 * motion.mouth_open), identity.head_height)
    down = jnp.clip(y / height, 0.0, 1.0)
    width = identity.head_width * (1.0 - identity.jaw * down * down)
    face = coverage(ellipse(x, y, width, height), pixel)
    away = jnp.clip(0.15 + 1.0 * x + 0.45 * y, 0.0, 1.0)  # light falls from the upper left
    glow = jnp.clip(0.45 - circle(x + 0.13, y + 0.2, 0.0), 0.0, 0.45)
    skin = identity.skin
    beard_edge = identity.mouth_y + 0.055 - 1.5 * frame.feature_x**2
    beard = coverage(beard_edge - frame.feature_y, 0.03)
    moustache = coverage(
        ellipse(frame.feature_x, frame.feature_y - identity.mouth_y + 0.05, 0.17, 0.035), 0.02
    )
    cheeks = coverage(circle(jnp.abs(frame.feature_x) - 0.24, frame.feature_y - 0.15, 0.08), 0.12)
    dots = jnp.minimum(
        circle(jnp.abs(frame.feature_x) - 0.13, frame.feature_y - 0.1, 0.014),
        circle(jnp.abs(frame.feature_x) - 0.19, frame.feature_y - 0.145, 0.014),
    )
    dots = jnp.minimum(dots, circle(jnp.abs(frame.feature_x) - 0.25, frame.feature_y - 0.1, 0.014))
    return [
        Layer(ears * (1.0 - long_hair), _shade(skin, 0.9), SKIN),
        Layer(inner_ear * ears * (1.0 - long_hair), _shade(skin, 0.72), SKIN),
        Layer(face, skin, SKIN),
        Layer(0.3 * face * away, _shade(skin, 0.55), SKIN),
        Layer(0.45 * face * glow, _tint(skin, 0.6), SKIN),
        Layer(identity.blush * cheeks, jnp.clip(skin * 0.6 + jnp.asarray([0.4, 0.08, 0.08]), 0.0, 1.0), SKIN),
        Layer(identity.freckles * coverage(dots, pixel), _shade(skin, 0.6), SKIN),
        Layer(identity.beard * face * jnp.maximum(beard, moustache), _shade(identity.hair, 0.85), HAIR),
    ]


def _nose(identity: Identity, frame: Frame) -> list[Layer]:
    x, y = frame.feature_x, frame.feature_y - identity.eye_y - 0.06 - identity.nose_length
    width = identity.nose_width
    under = coverage(lens(x, y - 0.015, width, 0.0, 0.035, -0.012), frame.head_pixel)
    side = coverage(lens(x - 0.5 * width, y + 0.07, 0.25 * width, -0.09, 0.08), 0.05)
    tip = coverage(circle(x + 0.012, y + 0.012, 0.018), 0.03)
    return [
        Layer(0.35 * side, _shade(identity.skin, 0.6), SKIN),
        Layer(under, _shade(identity.skin, 0.62), SKIN),
        Layer(0.6 * tip, _tint(identity.skin, 0.45), SKIN),
    ]


def _eyes(identity: Identity, motion: Motion, frame: Frame) -> list[Layer]:
    """Both eyes at once, in coordinates mirrored at the middle of the face."""
    pixel = frame.head_pixel
    side = jnp.sign(frame.feature_x)
    x = jnp.abs(frame.feature_x) - identity.eye_spacing
    y = frame.feature_y - identity.eye_y + identity.eye_slant * x
    width, height = identity.eye_width, identity.eye_height
    corner = 0.12 * height
    top, bottom = -height + 1.5 * height * motion.blink, 0.62 * height
    socket = coverage(lens(x, y, width * 1.06, -height * 1.12, bottom * 1.1, corner), pixel)
    gap = jnp.clip((bottom - top) / (2.0 * pixel), 0.0, 1.0)  # a gap below a pixel fades away
    opening = coverage(lens(x, y, width, top, bottom, corner), pixel) * gap
    iris_x = side * x - 0.3 * width * motion.gaze_x
    iris_y = y + 0.1 * height - 0.25 * height * motion.gaze_y
    iris = coverage(circle(iris_x, iris_y, identity.iris_size), pixel)
    pupil = coverage(circle(iris_x, iris_y, 0.46 * identity.iris_size), pixel)
    light = coverage(circle(iris_x + 0.018, iris_y + 0.02, 0.012), pixel)
    lash = coverage(stroke(x, y, width * 1.08, top, corner, 0.015), pixel)
    brow_y = identity.brow_height + 0.035 * motion.brow
    brow = coverage(
        stroke(x - 0.005, y + brow_y, 0.115, -identity.brow_arch, 0.012, identity.brow_thickness), pixel
    )
    white = jnp.asarray([0.96, 0.95, 0.93])
    return [
        Layer(socket, _shade(identity.skin, 0.82), EYES),
        Layer(opening, white, EYES),
        Layer(opening * iris, identity.iris, EYES),
        Layer(opening * pupil, jnp.asarray([0.05, 0.04, 0.05]), EYES),
        Layer(opening * light, jnp.ones(3), EYES),
        Layer(lash, _shade(0.4 * identity.hair + 0.3 * identity.skin, 0.35), EYES),
        Layer(0.9 * brow, _shade(0.75 * identity.hair + 0.1 * identity.skin, 0.75), OTHER),
    ]


def mouth_shape(identity: Identity, motion: Motion) -> tuple[Array, Array, Array, Array]:
    """Half-width of the mouth, and y of its corners and of the opening's edges, in feature units."""
    width = identity.mouth_width * (0.78 + 0.4 * motion.mouth_width + 0.14 * motion.smile)
    corner = identity.mouth_y - 0.035 * motion.smile + 0.03 * motion.mouth_open
    upper = identity.mouth_y + 0.012 * motion.smile - MOUTH_OPENING_UP * motion.mouth_open
    lower = identity.mouth_y + 0.012 * motion.smile + MOUTH_OPENING_DOWN * motion.mouth_open
    return width, corner, upper, lower


def _mouth(identity: Identity, motion: Motion, frame: Frame) -> list[Layer]:
    x, y, pixel = frame.feature_x, frame.feature_y, frame.head_pixel
    width, corner, upper, lower = mouth_shape(identity, motion)
    lip = identity.lip_thickness
    lips = coverage(lens(x, y, width + 0.02, upper - 0.8 * lip, lower + 1.1 * lip, corner), pixel)
    shine = coverage(
        lens(x + 0.02, y, 0.4 * width, lower + 0.35 * lip, lower + 0.7 * lip, lower + 0.5 * lip), 0.02
    )
    crease = coverage(stroke(x, y, width, upper, corner, 0.009), pixel)
    height = lower - upper
    inside = coverage(lens(x, y, width * 0.93, upper, lower, corner), pixel)
    inside = inside * jnp.clip(height / (1.5 * pixel), 0.0, 1.0)
    teeth_edge, _ = parabola(x, width, upper + jnp.minimum(0.3 * height, 0.05), corner)
    teeth = inside * coverage(y - teeth_edge, pixel) * jnp.clip(height * 14.0 - 0.5, 0.0, 1.0)
    tongue = inside * coverage(ellipse(x, y - lower, 0.62 * width, 0.36 * height + 0.005), 0.02)
    return [
        Layer(lips, identity.lips, MOUTH),
        Layer(0.35 * shine * lips, _tint(identity.lips, 0.6), MOUTH),
        Layer(crease, _shade(identity.lips, 0.42), MOUTH),
        Layer(inside, jnp.asarray([0.17, 0.03, 0.05]), MOUTH),
        Layer(tongue * 0.9, jnp.asarray([0.72, 0.27, 0.3]), MOUTH),
        Layer(teeth, jnp.asarray([0.95, 0.94, 0.91]), MOUTH),
    ]


def _glasses(identity: Identity, frame: Frame) -> list[Layer]:
    pixel = frame.head_pixel
    x, y = jnp.abs(frame.feature_x) - identity.eye_spacing, frame.feature_y - identity.eye_y
    square = identity.glasses_square
    lens_shape = square * box(x, y, 0.148, 0.108, 0.045) + (1.0 - square) * circle(x, y, 0.138)
    rim = jnp.abs(lens_shape) - 0.013
    bar = jnp.maximum(jnp.abs(y + 0.02) - 0.012, -lens_shape)
    bar = jnp.maximum(bar, jnp.abs(frame.feature_x) - identity.head_width - 0.01)
    frame_alpha = coverage(jnp.minimum(rim, bar), pixel) * identity.glasses
    glare = (
        coverage(lens_shape, pixel)
        * jnp.clip(0.6 - 6.0 * jnp.abs(x + y + 0.05), 0.0, 0.22)
        * identity.glasses
    )
    return [Layer(glare, jnp.ones(3), EYES), Layer(frame_alpha, identity.glasses_colour, OTHER)]


def _hair_front(identity: Identity, frame: Frame, front: Array) -> list[Layer]:
    x, y = frame.head_x, frame.head_y
    band = coverage(
        jnp.abs(ellipse(x, y + 0.03, identity.head_width, identity.head_height) + 0.045) - 0.025, 0.06
    )
    strands = jnp.sin(
        17.0 * (x + 0.4 * identity.hairline_tilt) / jnp.maximum(y + 1.0, 0.25)
    )  # fan out from the crown
    return [
        Layer(front, identity.hair, HAIR),
        Layer(0.22 * front * jnp.clip(strands, 0.0, 1.0), _shade(identity.hair, 0.6), HAIR),
        Layer(0.3 * front * band * coverage(y + 0.25, 0.2), _tint(identity.hair, 0.35), HAIR),
    ]


def face_layers(identity: Identity, motion: Motion, size: int) -> list[Layer]:
    """All layers of one picture (scalar motion), from back to front."""
    frame = head_frame(identity, motion, size)
    shirt, neck = _body(identity, motion, frame)
    back, front = _hair_shapes(identity, frame)
    hair_back = [Layer(back, _shade(identity.hair, 0.72), HAIR)]
    return [
        *_room(identity, frame), *shirt, *hair_back, *neck, *_head(identity, motion, frame),
        *_nose(identity, frame), *_hair_front(identity, frame, front), *_eyes(identity, motion, frame),
        *_mouth(identity, motion, frame), *_glasses(identity, frame),
    ]  # fmt: skip


def composite(layers: list[Layer], values: Array) -> Array:
    """Blends the layers' `values` (colours or region indicators) [L, C], back to front: [H, W, C]."""
    planes = []
    for channel in range(values.shape[-1]):  # one plane at a time is twice as fast on CPU as [H, W, C]
        plane = jnp.broadcast_to(values[0, channel], layers[0].alpha.shape)
        for layer, value in zip(layers[1:], values[1:, channel], strict=True):
            plane = plane + layer.alpha * (value - plane)
        planes.append(plane)
    return jnp.stack(planes, axis=-1)
