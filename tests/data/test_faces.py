import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.data.faces import (
    REGIONS,
    draw_identity,
    neutral_motion,
    random_motion,
    random_training_frames,
    region_masks,
    render,
)  # fmt: skip
from lavatar_jax.data.shapes import coverage, ellipse

SIZE = 32


@jax.jit
def picture(index, motion):
    identity = draw_identity(index)
    return render(identity, motion, SIZE), region_masks(identity, motion, SIZE)


def with_fields(frames=1, **fields):
    motion = neutral_motion(frames)
    return type(motion)(
        **{**vars(motion), **{name: jnp.full(frames, value, jnp.float32) for name, value in fields.items()}}
    )


def test_identities_depend_on_index_and_split_only():
    first, _ = picture(5, neutral_motion(1))
    again, _ = picture(5, neutral_motion(1))
    other, _ = picture(6, neutral_motion(1))
    assert np.array_equal(first, again)
    assert float(abs(first - other).mean()) > 0.05
    assert not np.allclose(draw_identity(5).skin, draw_identity(5, "heldout").skin)


def test_pictures_are_in_range_and_regions_share_every_pixel():
    video, masks = picture(3, neutral_motion(1))
    assert video.shape == (1, SIZE, SIZE, 3)
    assert float(video.min()) >= -1.001
    assert float(video.max()) <= 1.001
    assert masks.shape == (1, SIZE, SIZE, len(REGIONS))
    np.testing.assert_allclose(masks.sum(-1), 1.0, atol=1e-5)


def test_mouth_grows_with_openness_and_lids_hide_the_eyes():
    areas = []
    for openness in (0.0, 0.5, 1.0):
        _, masks = picture(3, with_fields(mouth_open=openness))
        areas.append(float(masks[..., REGIONS.index("mouth")].sum()))
    assert areas[0] * 1.5 < areas[1] < areas[2]
    opened, _ = picture(3, with_fields(blink=0.0))
    closed, _ = picture(3, with_fields(blink=1.0))
    assert float(abs(opened - closed).max()) > 0.3


def test_skin_tones_cover_light_and_dark_evenly():
    skins = jax.jit(jax.vmap(draw_identity))(jnp.arange(400)).skin.mean(-1)
    shares = np.histogram(np.asarray(skins), bins=[0.0, 0.3, 0.45, 0.6, 0.75, 1.0])[0] / 400
    assert shares.min() > 0.12


def test_thin_ellipse_leaks_no_line():
    x = jnp.linspace(-1, 1, 201)[None]
    y = jnp.linspace(-0.1, 0.1, 21)[:, None]
    drawn = coverage(ellipse(x, y, 0.3, 0.002), 0.01)
    assert float(jnp.where(abs(x) > 0.32, drawn, 0.0).max()) == 0.0
    assert float(drawn.max()) > 0.5


def test_training_frames_weight_mouth_and_eyes():
    video, weights = jax.jit(lambda key: random_training_frames(key, 2, 5, SIZE))(jax.random.key(1))
    assert video.shape == (2, 5, SIZE, SIZE, 3)
    assert weights.shape == (2, 5, SIZE, SIZE, 1)
    assert float(weights.min()) == pytest.approx(1.0)
    assert float(weights.max()) == pytest.approx(4.0, abs=0.05)


def test_random_motion_covers_the_range_of_openness():
    motions = jax.jit(jax.vmap(lambda key: random_motion(key, 5)))(jax.random.split(jax.random.key(0), 300))
    openness = np.asarray(motions.mouth_open)
    assert (openness < 0.02).mean() > 0.1
    assert (openness > 0.8).mean() > 0.05
    assert 0.2 < openness.mean() < 0.5
    assert 0.15 < (np.asarray(motions.blink).max(1) > 0.8).mean() < 0.45
