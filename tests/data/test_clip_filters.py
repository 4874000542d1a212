import numpy as np
import pytest

from lavatar_jax.data.clip_filters import (
    CLIPPED,
    MANY_FACES,
    MOVES,
    NO_FACE,
    SHORT,
    SILENT,
    SMALL,
    Box,
    FilterConfig,
    clip_starts,
    face_crop,
    face_in_crop,
    judge_faces,
    judge_sound,
    nearest_size,
    reference_frame,
    shortest_piece,
    split_shots,
)
from lavatar_jax.data.preparation_report import render_report
from lavatar_jax.data.shots import find_cuts, nearest_frames

CONFIG = FilterConfig()
FACE = Box(100, 80, 60, 60)


def scene(seed: int, frames: int, *, moving: float = 0.0) -> np.ndarray:
    """A blurred random picture [T, 18, 32] that shakes a little, or pans by `moving` cells a frame."""
    random = np.random.default_rng(seed)
    wide = np.repeat(random.uniform(0, 255, (18, 100)), 4, axis=1)
    rows = [wide[:, int(moving * 4 * t) : int(moving * 4 * t) + 128 : 4] for t in range(frames)]
    return np.clip(np.stack(rows) + random.normal(0, 2, (frames, 18, 32)), 0, 255).astype(np.uint8)


def test_hard_cuts_are_found_and_nothing_else():
    video = np.concatenate([scene(0, 40), scene(1, 30), scene(2, 50)])
    assert find_cuts(video) == [40, 70]
    blended = video.copy()
    blended[40] = (video[39].astype(int) + video[41]) // 2
    assert len(find_cuts(blended)) == 2
    assert find_cuts(scene(3, 60)) == []
    assert find_cuts(scene(3, 60, moving=1.0)) == []  # a panning camera changes every frame
    assert find_cuts(scene(3, 60, moving=0.5)) == []  # and here every other one
    flash = scene(4, 60)
    flash[30] = 255
    assert find_cuts(flash) == []
    assert find_cuts(scene(0, 1)) == []
    assert find_cuts(np.concatenate([scene(0, 1), scene(1, 1)])) == [1]


@pytest.mark.parametrize(("fps", "expected"), [(50, [0, 2, 4, 6]), (25, [0, 1, 2, 3]), (12.5, [0, 0, 1, 1])])
def test_any_rate_becomes_25_a_second(fps: float, expected: list[int]):
    times = 7.0 + np.arange(int(0.13 * fps) + 1) / fps
    assert nearest_frames(times, 25).tolist()[: len(expected)] == expected[: int((times[-1] - 7) * 25 + 1.01)]


def test_uneven_times_show_the_nearest_frame():
    assert nearest_frames(np.array([0.0, 0.05, 0.06, 0.2]), 25).tolist() == [0, 1, 2, 2, 3, 3]
    assert nearest_frames(np.array([3.0]), 25).tolist() == [0]


def test_shots_are_divided_and_short_ones_named():
    pieces, short = split_shots([100, 350], 350 + 1600, CONFIG)
    assert short == [(0, 100, SHORT)]
    assert pieces == [(101, 349), (351, 884), (884, 1417), (1417, 1950)]
    assert split_shots([], 50, CONFIG) == ([], [(0, 50, SHORT)])


def test_no_piece_is_too_short_for_a_record():
    useful = shortest_piece(73, 84, CONFIG)
    (start,) = clip_starts(useful, 73, 84)
    stop = start + 73 + 84
    assert reference_frame(start, stop, useful, name="a", config=CONFIG) == useful - 1
    assert reference_frame(start, stop, useful - 1, name="a", config=CONFIG) is None
    pieces, short = split_shots([useful - 1], 2 * useful, CONFIG, useful=useful)
    assert pieces == [(useful, 2 * useful)]
    assert short == [(0, useful - 1, "shot too short for a record, which takes 7.32 s")]
    config = FilterConfig(seconds=(5, 8))  # two halves of 4.2 s would be of no use
    assert split_shots([], 210, config, useful=useful) == ([(0, 210)], [])
    assert split_shots([], 2 * useful, config, useful=useful)[0] == [(0, useful), (useful, 2 * useful)]


def test_exactly_one_face():
    assert judge_faces([[FACE]] * 10, CONFIG) is None
    assert judge_faces([[FACE]] * 8 + [[]] * 2, CONFIG) is None
    assert judge_faces([[FACE]] * 7 + [[]] * 3, CONFIG) == NO_FACE
    assert judge_faces([[FACE]] * 8 + [[FACE, FACE]] * 2, CONFIG) == MANY_FACES
    assert judge_faces([], CONFIG) == NO_FACE


def test_the_cut_holds_the_face_and_stays_in_the_picture():
    top, left, height, width = face_crop([FACE] * 5, (240, 320), (128, 128), CONFIG)
    assert (height, width) == (133, 133)
    assert left + width / 2 == pytest.approx(FACE.left + FACE.width / 2, abs=1)
    assert 0 <= top <= FACE.top
    assert top + height >= FACE.top + FACE.height
    corner = face_crop([Box(0, 0, 60, 60)], (240, 320), (128, 128), CONFIG)
    assert corner[:2] == (0, 0)
    places = face_in_crop([FACE] * 5, (top, left, height, width))
    assert places[2] - places[0] == pytest.approx(0.45, abs=0.01)  # `face_height`
    assert places[1] + places[3] == pytest.approx(1.0, abs=0.02)  # in the middle
    assert face_in_crop([Box(0, 0, 300, 300)], (100, 100, 50, 50)) == (0.0, 0.0, 1.0, 1.0)
    wide = face_crop([FACE], (240, 320), (64, 128), CONFIG)
    assert wide[3] == 2 * wide[2]
    assert face_crop([Box(100, 80, 30, 30)], (240, 320), (128, 128), CONFIG) == SMALL
    walking = [Box(x, 80, 60, 60) for x in range(0, 260, 10)]
    assert face_crop(walking, (240, 320), (128, 128), CONFIG) == MOVES
    assert nearest_size(1080, 1920, ((384, 704), (704, 384), (512, 512))) == (384, 704)


def test_silence_and_clipped_sound():
    speech = 0.05 * np.random.default_rng(0).normal(size=16000).astype(np.float32)
    assert judge_sound(speech, CONFIG) is None
    assert judge_sound(0 * speech, CONFIG) == SILENT
    assert judge_sound(speech / 100, CONFIG) == SILENT
    assert judge_sound(np.clip(speech * 100, -1, 1), CONFIG) == CLIPPED


def test_clips_lie_end_to_end_and_references_away_from_them():
    starts = clip_starts(130, 9, 48)
    assert starts == [0, 48]  # 9 frames of the past and 48 new ones each
    assert clip_starts(56, 9, 48) == []
    for start in starts:
        frame = reference_frame(start, start + 57, 130, name="a", config=CONFIG)
        assert frame == reference_frame(start, start + 57, 130, name="a", config=CONFIG)
        assert frame < start - 25 or frame >= start + 57 + 25
    assert reference_frame(10, 67, 80, name="a", config=CONFIG) is None


def test_the_report_counts_reasons_and_escapes_names():
    video = {
        "name": "<b>.mp4", "seconds": 5.0, "fps": 25.0, "records": 2, "frames": 96,
        "pieces": [{"face": 60, "level_db": -20.0}], "dropped": [("0 - 1 s", "no face")],
        "notes": ["no caption"],
    }  # fmt: skip
    other = {**video, "name": "c.mp4", "records": 0, "frames": 0, "pieces": []}
    page = render_report([video, other], {"<i>": b"jpeg"}, 1)
    assert "<b>2</b> records" in page
    assert "<b>1</b> of 2 videos; <b>1</b> records have a driving pose" in page
    assert "<td>no face</td><td><details><summary>2</summary>" in page
    assert "&lt;b&gt;.mp4: 0 - 1 s" in page
    assert "<b>.mp4" not in page
    assert page.count("<svg") == 4
