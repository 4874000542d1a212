"""Rotary positions: relative, exact at any age of the video, and laid out as the reference does."""

import decimal
import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavatar_jax.models import rope as rp
from tests.tiny import normal

PI = decimal.Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
FRAMES = st.integers(0, 10**9)


def at(frame: int, row: int = 0, column: int = 0, *, head_dim: int = 24) -> rp.Rope:
    """The table of one token."""
    grid = rp.Grid((frame, row, column), (frame + 1, row + 1, column + 1), (1, 1, 1))
    return rp.rope([grid], head_dim)


def score(query: rp.Rope, key: rp.Rope, head_dim: int = 24) -> float:
    """The attention score of one fixed query and key at two places."""
    q, k = normal(1, 1, 1, 1, head_dim), normal(2, 1, 1, 1, head_dim)
    return float(jnp.sum(rp.apply_rope(q, query) * rp.apply_rope(k, key)))


@given(frame=FRAMES, shift=FRAMES, place=st.tuples(*[st.integers(0, 60)] * 4), distance=st.integers(-30, 30))
def test_scores_depend_on_differences_of_positions_only(frame, shift, place, distance) -> None:
    row, column, other_row, other_column = place
    frame = max(frame, -distance)
    here = score(at(frame, row, column), at(frame + distance, other_row, other_column))
    there = score(
        at(frame + shift, row + 7, column + 5), at(frame + shift + distance, other_row + 7, other_column + 5)
    )
    assert here == pytest.approx(there, abs=2e-5)


def test_scores_do_depend_on_the_difference_along_every_axis() -> None:
    here = score(at(5, 5, 5), at(5, 5, 5))
    moved = [score(at(5, 5, 5), at(*place)) for place in [(6, 5, 5), (5, 6, 5), (5, 5, 6)]]
    assert all(abs(other - here) > 1e-2 for other in moved)
    assert len({round(other, 4) for other in moved}) == 3


def exact_cosines(position: int, dim: int) -> list[float]:
    """cos(position * 10000^(-2i/dim)) with the angle reduced in 60 decimal digits."""
    with decimal.localcontext(prec=60):
        cosines = []
        for i in range(dim // 2):
            exponent = decimal.Decimal(-2 * i) / decimal.Decimal(dim)
            angle = position * (decimal.Decimal(10_000).ln() * exponent).exp()
            cosines.append(math.cos(float(angle % (2 * PI))))
        return cosines


@pytest.mark.parametrize("frame", [1, 44_999, 45_000, 10**6, 10**9])
def test_angles_are_exact_at_any_age(frame: int) -> None:
    """The reference's table ends at 45,000; float32 positions would be off by radians at 10^9."""
    dim, _, _ = rp.axis_dims(128)
    got = at(frame, head_dim=128).cos[0, : dim // 2]
    np.testing.assert_allclose(got, exact_cosines(frame, dim), atol=3e-7)


@pytest.mark.parametrize(
    ("head_dim", "dims"), [(128, (44, 42, 42)), (16, (8, 4, 4)), (8, (4, 2, 2)), (4, (4, 0, 0))]
)
def test_channels_are_split_over_frame_row_column(head_dim, dims) -> None:
    assert rp.axis_dims(head_dim) == dims
    assert at(1, head_dim=head_dim).cos.shape == (1, head_dim // 2)


def positions(grid: rp.Grid, axis: int) -> list[float]:
    """Positions along an axis, read off the angle of its first channel pair (frequency 1)."""
    dims = rp.axis_dims(24)
    angle = rp.angles([grid], 24).reshape(*grid.shape, -1)
    return np.moveaxis(angle, axis, 0)[:, 0, 0, sum(dims[:axis]) // 2].tolist()


@given(start=st.integers(0, 1000), count=st.integers(1, 60), coarse=st.integers(1, 60))
def test_positions_are_a_truncated_linspace(start, count, coarse) -> None:
    """trunc(linspace(start, start + target - 1, count)), computed here in rationals."""
    target = count * coarse
    grid = rp.Grid((start, start, 0), (start + count, start + count, 1), (target, target, 1))
    step = Fraction(target - 1, max(count - 1, 1))
    want = [start + math.floor(step * i) for i in range(count)]
    assert positions(grid, 0) == want
    assert positions(grid, 1) == want


def test_negative_frames_are_truly_negative() -> None:
    """Packed motion frames: one of 1 frame, one of 2, four of 4 (reference behaviour 3.1)."""
    near, middle, far = rp.motion_grids(16, 24)
    assert [positions(grid, 0) for grid in (near, middle, far)] == [[-1], [-3], [-19, -14, -9, -4]]
    assert [grid.shape for grid in (near, middle, far)] == [(1, 8, 12), (1, 4, 6), (4, 2, 3)]
    assert positions(far, 1) == [0, 7]
    assert positions(middle, 2) == [0, 2, 4, 6, 8, 11]
    np.testing.assert_allclose(rp.rope([near], 8).sin[0, :2], np.sin([-1, -0.01]), rtol=1e-6)


def test_the_distance_across_the_start_of_the_video_counts_too() -> None:
    before = rp.rope([rp.Grid((-3, 0, 0), (-2, 1, 1), (1, 1, 1))], 24)
    assert score(at(2), before) == pytest.approx(score(at(5), at(0)), abs=1e-5)


def test_rolling_motion_grids_moves_the_two_newest_groups() -> None:
    still, rolled = rp.motion_grids(8, 8), rp.motion_grids(8, 8, roll=10)
    assert [grid.start[0] for grid in rolled] == [9, 7, -19]
    assert rolled[2] == still[2]


@given(height=st.integers(4, 20), width=st.integers(4, 20), roll=FRAMES)
def test_only_the_reference_of_the_sink_rolls(height, width, roll) -> None:
    still = rp.sink_grids(2 * height, 2 * width, roll=0)
    rolled = rp.sink_grids(2 * height, 2 * width, roll=roll)
    assert rolled[0].start[0] == 30 + roll
    assert rolled[1:] == still[1:]
    assert rp.sink_grids(2 * height, 2 * width, roll=roll, motion=False) == rolled[:1]


@given(frame=FRAMES, distance=st.integers(0, 30))
def test_the_sink_waits_at_30_then_keeps_its_distance(frame, distance) -> None:
    place = rp.REFERENCE_FRAME + rp.sink_roll(frame, distance)
    assert place == max(30, frame + distance)
    # It never comes nearer than the distance, and follows the video frame by frame once it moves.
    assert rp.sink_roll(frame + 1, distance) - rp.sink_roll(frame, distance) in (0, 1)


def test_half_precision_tables_are_rounded_cosines() -> None:
    grid = [rp.video_grid(40_000, 3, 2, 2)]
    exact, half = rp.rope(grid, 32), rp.rope(grid, 32, half_table=True)
    np.testing.assert_array_equal(half.cos, exact.cos.astype(np.float16).astype(np.float32))
    assert 0 < np.abs(half.sin - exact.sin).max() < 5e-4


def test_a_zero_rope_erases_and_tables_join() -> None:
    x = normal(0, 1, 5, 2, 8)
    table = rp.concatenate(rp.rope([rp.video_grid(0, 1, 1, 2)], 8), rp.zero_rope(3, 8))
    y = rp.apply_rope(x, table)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])  # position 0
    assert (np.asarray(y[:, 2:]) == 0).all()


def test_rotation_keeps_length_and_dtype() -> None:
    x, table = normal(0, 1, 4, 2, 16), rp.rope([rp.video_grid(7, 1, 2, 2)], 16)
    y = rp.apply_rope(x, table)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert rp.apply_rope(x.astype(jnp.bfloat16), table).dtype == jnp.bfloat16


def test_tables_are_shared_and_cannot_be_written_to() -> None:
    grids = rp.sink_grids(8, 8, 2, motion=False)
    first, second = rp.rope(grids, 24), rp.rope(grids, 24)
    assert first.cos is second.cos
    with pytest.raises(ValueError, match="read-only"):
        first.cos[0] = 0


@pytest.mark.parametrize("half", [False, True])
def test_tables_are_functions_of_the_angles(half: bool) -> None:
    """Cosines are taken axis by axis, before they are laid over the grid; that must change no bit."""
    grids = rp.sink_grids(16, 24, 2, roll=1_000_003)
    angle = rp.angles(grids, 24)
    table = rp.rope(grids, 24, half_table=half)
    for part, function in zip(table, (np.cos, np.sin), strict=True):
        want = function(angle).astype(np.float32)
        if half:
            want = want.astype(np.float16).astype(np.float32)
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, want)
