"""Where a video cuts from one shot to another, from tiny grey pictures of its frames."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

THUMBNAIL = (18, 32)  # rows and columns: faces move by less than a cell a frame, a cut changes all of them

JUMP = 0.05  # mean change between frames, of the full range: a talking person changes 0.01
OUTSTANDING = 3.0  # times the usual change around it: camera movement is large everywhere
USUAL = 0.8  # quantile: in a slower video that was brought to this rate, most frames repeat the last one
AROUND = 12  # frames on either side
FLASH = 3  # frames; a picture that is back after so many was a flash or a dropped frame, no cut


def find_cuts(thumbnails: NDArray[np.uint8]) -> list[int]:
    """Frames [T, h, w] -> numbers of the frames that begin a new shot (never 0).

    Hard cuts only: a dissolve is as slow as a person who leans forward.
    """
    frames = thumbnails.astype(np.float32) / 255
    if len(frames) < 2:
        return []
    change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2))  # change[t]: from frame t to t + 1
    cuts = []
    for t in map(int, np.flatnonzero(change > JUMP)):
        low = max(0, t - AROUND)
        others = np.delete(change[low : t + AROUND + 1], t - low)
        if len(others) and change[t] < OUTSTANDING * np.quantile(others, USUAL):
            continue
        if change[t] < change[max(0, t - 1) : t + 2].max():  # a blended frame between the shots: cut once
            continue
        before = frames[max(0, t - 1) : t + 1]
        after = frames[t + 1 : t + 2 + FLASH]
        back = np.abs(before[:, None] - after[None]).mean(axis=(2, 3)).min()
        if back > 0.5 * change[t]:
            cuts.append(t + 1)
    return cuts


def nearest_frames(times: NDArray[np.float64], fps: float) -> NDArray[np.int64]:
    """Which frame to show at k / fps seconds after the first: the nearest in time, at any (or varying) rate.

    `times`: seconds [n], not decreasing.
    """
    times = times - times[0]
    wanted = np.arange(int(np.floor(times[-1] * fps + 1e-6)) + 1) / fps
    after = np.clip(np.searchsorted(times, wanted), 1, max(1, len(times) - 1))
    if len(times) == 1:
        return np.zeros(len(wanted), np.int64)
    return np.where(wanted - times[after - 1] <= times[after] - wanted, after - 1, after)
