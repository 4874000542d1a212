"""Cartoon faces: pictures of an `Identity` in a `Motion`, region masks, and random training frames."""

import jax
import jax.numpy as jnp

from lavatar_jax.data.faces_identity import Identity, draw_identity
from lavatar_jax.data.faces_render import REGIONS, Motion, composite, face_layers, head_frame, neutral_motion
from lavatar_jax.data.shapes import box, coverage

__all__ = [
    "REGIONS", "Identity", "Motion", "attention_map", "draw_identity", "neutral_motion", "random_motion",
    "random_training_frames", "region_masks", "render",
]  # fmt: skip

Array = jax.Array


def render(identity: Identity, motion: Motion, size: int) -> Array:
    """Pictures [T, size, size, 3] in [-1, 1] of one identity, for motion fields of [T]."""

    def one(pose: Motion) -> Array:
        layers = face_layers(identity, pose, size)
        return composite(layers, jnp.stack([layer.colour for layer in layers])) * 2.0 - 1.0

    return jax.vmap(one)(motion)


def region_masks(identity: Identity, motion: Motion, size: int) -> Array:
    """How much of each pixel belongs to each of `REGIONS`: [T, size, size, len(REGIONS)], summing to 1."""

    def one(pose: Motion) -> Array:
        layers = face_layers(identity, pose, size)
        return composite(
            layers, jax.nn.one_hot(jnp.asarray([layer.region for layer in layers]), len(REGIONS))
        )

    return jax.vmap(one)(motion)


def attention_map(
    identity: Identity, motion: Motion, size: int, mouth_weight: float = 4.0, eye_weight: float = 3.0
) -> Array:
    """Loss weights [T, size, size, 1]: 1, rising smoothly around the mouth and the eyes."""

    def one(pose: Motion) -> Array:
        frame = head_frame(identity, pose, size)
        x, y = frame.feature_x, frame.feature_y
        mouth = coverage(box(x, y - identity.mouth_y - 0.07, 0.25, 0.17, 0.05), 0.08)
        eyes = coverage(box(jnp.abs(x) - identity.eye_spacing, y - identity.eye_y, 0.15, 0.11, 0.05), 0.08)
        return jnp.maximum(1.0 + (mouth_weight - 1.0) * mouth, 1.0 + (eye_weight - 1.0) * eyes)[..., None]

    return jax.vmap(one)(motion)


def _smooth_noise(key: Array, frames: int, correlation: float) -> Array:
    """A stationary Gaussian process [frames] of unit variance, smoothed over about `correlation` frames."""
    reach = int(3 * correlation) + 1
    kernel = jnp.exp(-0.5 * (jnp.arange(-reach, reach + 1) / correlation) ** 2)
    kernel = kernel / jnp.sqrt(jnp.sum(kernel**2))
    return jnp.convolve(jax.random.normal(key, (frames + 2 * reach,)), kernel, mode="valid")


def random_motion(key: Array, frames: int, blink_probability: float = 0.35) -> Motion:
    """A plausible motion [frames] without any speech: syllable-like openness, sway, and at most one blink."""
    keys = jax.random.split(key, 16)
    uniform = jax.random.uniform
    syllables = _smooth_noise(keys[0], frames, 1.4)
    level = uniform(keys[1], (), minval=-0.25, maxval=0.8)
    mouth_open = jnp.clip(level + 0.38 * syllables, 0.0, 1.0)
    mouth_width = jnp.clip(0.5 + 0.22 * _smooth_noise(keys[2], frames, 2.0), 0.0, 1.0)
    smile = jnp.clip(
        uniform(keys[3], (), minval=-0.4, maxval=1.0) + 0.1 * _smooth_noise(keys[4], frames, 8.0), -0.5, 1
    )
    # A blink: the lid falls in 2 frames and rises in 3.
    centre = uniform(keys[5], (), minval=-2.0, maxval=frames + 1.0)
    since = jnp.arange(frames) - centre
    lid = jnp.clip(1.3 - jnp.where(since < 0, -since / 2.0, since / 3.0), 0.0, 1.0)
    blink = jnp.where(uniform(keys[6]) < blink_probability, lid, 0.0)
    sway = uniform(keys[7], (), minval=0.1, maxval=1.9)

    def moved(key: Array) -> Array:
        """As quick as the heads of people who talk (`motion.talking_motion`), and a little livelier."""
        fast, slow = jax.random.split(key)
        return sway * (0.9 * _smooth_noise(fast, frames, 3.0) + 0.43 * _smooth_noise(slow, frames, 20.0))

    gaze = jnp.where(uniform(keys[8]) < 0.5, uniform(keys[9], (2,), minval=-0.8, maxval=0.8), 0.0)
    return Motion(
        mouth_open=mouth_open, mouth_width=mouth_width, smile=smile, blink=blink,
        gaze_x=gaze[0] + 0.05 * _smooth_noise(keys[10], frames, 6.0),
        gaze_y=jnp.broadcast_to(gaze[1], (frames,)),
        brow=jnp.clip(0.35 * _smooth_noise(keys[11], frames, 8.0), -1.0, 1.0),
        head_x=0.020 * moved(keys[12]),
        head_y=0.016 * moved(keys[13]),
        roll=0.035 * moved(keys[14]),
    )  # fmt: skip


def random_training_frames(key: Array, batch: int, frames: int = 5, size: int = 128) -> tuple[Array, Array]:
    """Short clips of random training identities in random motions, for training a VAE; call it inside jit.

    Returns:
        video [batch, frames, size, size, 3] in [-1, 1] and loss weights [batch, frames, size, size, 1].
    """

    def one(key: Array) -> tuple[Array, Array]:
        who, how = jax.random.split(key)
        identity = draw_identity(jax.random.randint(who, (), 0, 1_000_000))
        motion = random_motion(how, frames)
        return render(identity, motion, size), attention_map(identity, motion, size)

    return jax.vmap(one)(jax.random.split(key, batch))
