"""Which parts of a real video may be trained on, and how they are cut: decisions over numbers, no media.

A reason to drop something is a short text: it is counted by it in the report.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lavatar_jax.models.speech_level import speech_level_db

FPS = 25  # of records
SHORT, SLOW = "shot too short", "too few frames a second"
NO_FACE, MANY_FACES, SMALL, MOVES = "no face", "several faces", "face too small", "face leaves the picture"
SILENT, CLIPPED = "silent", "sound is clipped"
NO_REFERENCE = "clip without a reference picture"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What is asked of a clip."""

    seconds: tuple[float, float] = (5.0, 30.0)
    """Shortest and longest piece of a shot; longer shots are divided."""
    min_fps: float = 20.0
    """Slower videos jerk when brought to 25."""
    face_share: float = 0.8
    """Share of looks that find exactly one face."""
    crowd_share: float = 0.1
    """Share of looks that may find several."""
    face_height: float = 0.45
    """Height of the face in the picture that is cut out."""
    min_scale: float = 0.6
    """Smallest height of the cut, as a share of that of the model's picture (1: never enlarged)."""
    min_level_db: float = -50.0
    """Speech softer than this is silence; dB of full scale."""
    max_clipped: float = 0.01
    """Share of samples at full scale."""
    reference_gap: float = 1.0
    """Seconds between a clip and its reference picture."""

    @property
    def gap_frames(self) -> int:
        return round(self.reference_gap * FPS)


class Box(NamedTuple):
    """In pixels."""

    left: float
    top: float
    width: float
    height: float


def shortest_piece(motion_frames: int, clip_frames: int, config: FilterConfig) -> int:
    """Frames of a piece that just gives a record: a clip with its past before it, and behind the gap a
    reference."""
    return motion_frames + clip_frames + config.gap_frames + 1


def split_shots(
    cuts: Sequence[int], frames: int, config: FilterConfig, *, useful: int = 1
) -> tuple[list[tuple[int, int]], list[tuple[int, int, str]]]:
    """(pieces, too short shots with the reason) of a video with `cuts`, as frame ranges.

    `useful`: frames of the shortest piece that gives a record. A shot longer than the longest piece is
    divided into equal pieces, but not into useless ones. The frames beside a cut are left out: encoders
    smear it.
    """
    asked, longest = (round(FPS * seconds) for seconds in config.seconds)
    shortest = max(asked, useful)
    edges = [0, *cuts, frames]
    pieces: list[tuple[int, int]] = []
    short: list[tuple[int, int, str]] = []
    for start, stop in itertools.pairwise(edges):
        first, last = start + (start > 0), stop - (stop < frames)
        if last - first < shortest:
            reason = SHORT if last - first < asked else f"{SHORT} for a record, which takes {useful / FPS} s"
            short.append((start, stop, reason))
            continue
        parts = max(1, min(-(-(last - first) // longest), (last - first) // shortest))
        bounds = [first + (last - first) * i // parts for i in range(parts + 1)]
        pieces += itertools.pairwise(bounds)
    return pieces, short


def judge_faces(looks: Sequence[Sequence[Box]], config: FilterConfig) -> str | None:
    """Why a piece, looked at several times, does not show exactly one face; None: it does."""
    count = np.array([len(boxes) for boxes in looks])
    if not len(count):
        return NO_FACE
    if np.mean(count > 1) > config.crowd_share:
        return MANY_FACES
    return NO_FACE if np.mean(count == 1) < config.face_share else None


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of nearest proportions."""
    return min(sizes, key=lambda size: abs(np.log(size[0] / size[1]) - np.log(height / width)))


def face_crop(
    boxes: Sequence[Box], picture: tuple[int, int], target: tuple[int, int], config: FilterConfig
) -> tuple[int, int, int, int] | str:
    """What to cut out around a face: (top, left, height, width) in pixels, of the proportions of `target`.

    One cut for the whole piece, so that the picture keeps still. Returns a reason where there is none.
    `picture`, `target`: (height, width) of the video and of the model's picture.
    """
    places = np.array(boxes, np.float64)
    left, top, width, height = np.median(places, axis=0)
    scale = min(picture[0], height / config.face_height) / target[0]
    scale = min(scale, picture[1] / target[1])
    rows, columns = int(scale * target[0]), int(scale * target[1])
    if scale < config.min_scale:
        return SMALL
    # The middle of the face lies a little above the middle of the picture: shoulders below.
    first_row = int(np.clip(top + 0.5 * height - 0.45 * rows, 0, picture[0] - rows))
    first_column = int(np.clip(left + 0.5 * width - 0.5 * columns, 0, picture[1] - columns))
    middles = places[:, :2] + 0.5 * places[:, 2:] - (first_column, first_row)
    margin = 0.2 * np.minimum(places[:, 2:], (columns, rows))
    inside = np.all((middles >= margin) & (middles <= (columns, rows) - margin), axis=1)
    if inside.mean() < 0.9:
        return MOVES
    return first_row, first_column, rows, columns


def face_in_crop(boxes: Sequence[Box], crop: tuple[int, int, int, int]) -> tuple[float, ...]:
    """Where a face mostly is in what `face_crop` cuts out: top, left, bottom and right, in shares of it."""
    top, left, rows, columns = crop
    x, y, width, height = np.median(np.array(boxes, np.float64), axis=0)
    edges = ((y - top) / rows, (x - left) / columns, (y + height - top) / rows, (x + width - left) / columns)
    return tuple(float(np.clip(edge, 0.0, 1.0)) for edge in edges)


def judge_sound(samples: NDArray[np.float32], config: FilterConfig) -> str | None:
    """Why the sound of a piece is of no use; None: it is."""
    if speech_level_db(samples) < config.min_level_db:
        return SILENT
    return CLIPPED if np.mean(np.abs(samples) > 0.999) > config.max_clipped else None


def clip_starts(frames: int, motion_frames: int, clip_frames: int) -> list[int]:
    """First frames (of the context) of the clips in a piece: end to end, each with its context before it."""
    return list(range(0, frames - motion_frames - clip_frames + 1, clip_frames))


def reference_frame(start: int, stop: int, frames: int, *, name: str, config: FilterConfig) -> int | None:
    """A frame of a piece away from the clip [start, stop), always the same; None if the piece is short."""
    gap = config.gap_frames
    away = [*range(0, max(0, start - gap)), *range(stop + gap, frames)]
    return away[zlib.crc32(f"{name} {start}".encode()) % len(away)] if away else None
