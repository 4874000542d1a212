"""Antialiased shapes as signed distance functions (negative inside), the vocabulary of the face renderer.

All take pixel coordinates `x`, `y` [H, W] (any broadcastable shapes), x to the right and y downwards.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def coverage(distance: Array, width: Array | float) -> Array:
    """Turns a distance into the covered share of a pixel: a linear ramp of `width` around the edge."""
    return jnp.clip(0.5 - distance / width, 0.0, 1.0)


def circle(x: Array, y: Array, radius: Array | float) -> Array:
    return jnp.sqrt(x * x + y * y + 1e-12) - radius


def ellipse(x: Array, y: Array, rx: Array | float, ry: Array | float) -> Array:
    """First-order distance to an ellipse.

    The first-order formula is far too small beyond the tips of a thin ellipse, which draws a line across the
    picture; the bounding box is a lower bound of the true distance and cuts that off.
    """
    u, v = x * (1.0 / rx), y * (1.0 / ry)
    norm = jnp.sqrt(u * u + v * v + 1e-12)
    gradient = jnp.sqrt((u * (1.0 / rx)) ** 2 + (v * (1.0 / ry)) ** 2 + 1e-12)
    box_bound = jnp.maximum(jnp.abs(x) - rx, jnp.abs(y) - ry)
    return jnp.maximum(norm * (norm - 1.0) / gradient, box_bound)


def box(
    x: Array, y: Array, half_width: Array | float, half_height: Array | float, radius: Array | float
) -> Array:
    """Distance to a box with rounded corners of the given radius."""
    qx, qy = jnp.abs(x) - half_width + radius, jnp.abs(y) - half_height + radius
    outside = jnp.sqrt(jnp.maximum(qx, 0.0) ** 2 + jnp.maximum(qy, 0.0) ** 2 + 1e-12)
    return outside + jnp.minimum(jnp.maximum(qx, qy), 0.0) - radius


def parabola(
    x: Array, half_width: Array | float, middle: Array | float, corner: Array | float
) -> tuple[Array, Array]:
    """A curve y(x) through `middle` at 0 and `corner` at +-half_width, and its length per unit of x."""
    u = x * (1.0 / half_width)
    y = middle + (corner - middle) * u * u
    slope = 2.0 * (corner - middle) * u * (1.0 / half_width)
    return y, jnp.sqrt(1.0 + slope * slope)


def lens(
    x: Array,
    y: Array,
    half_width: Array | float,
    top: Array | float,
    bottom: Array | float,
    corner: Array | float = 0.0,
) -> Array:
    """Distance to the region between two parabolas that meet at the corners (lips, eyelids).

    `top` and `bottom` are the y of the curves in the middle, `corner` the y where they meet.
    """
    upper, upper_scale = parabola(x, half_width, top, corner)
    lower, lower_scale = parabola(x, half_width, bottom, corner)
    between = jnp.maximum((upper - y) / upper_scale, (y - lower) / lower_scale)
    return jnp.maximum(between, jnp.abs(x) - half_width)


def stroke(
    x: Array,
    y: Array,
    half_width: Array | float,
    middle: Array | float,
    corner: Array | float,
    thickness: Array | float,
) -> Array:
    """Distance to a parabolic stroke that tapers to its ends; `thickness` is half its width in the middle."""
    curve, scale = parabola(x, half_width, middle, corner)
    taper = thickness * (1.0 - 0.6 * (x * (1.0 / half_width)) ** 2)
    return jnp.maximum(jnp.abs(y - curve) / scale - taper, jnp.abs(x) - half_width)
