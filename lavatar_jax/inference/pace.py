"""When a live block is due, and when it is late: time counted in blocks from a clock's origin."""

from __future__ import annotations

import math


class Pace:
    """Blocks of `period` seconds. Positions count all blocks from the session's start, held ones included."""

    def __init__(self, period: float, cushion: float) -> None:
        self._period, self._cushion = period, cushion
        self._origin = 0.0
        self._base = 0
        self._playout: float | None = None  # the block at `_base` is shown then

    def start(self, now: float, position: int = 0) -> None:
        """The block at `position` begins now."""
        self._origin, self._base, self._playout = now, position, None

    def begins(self, position: int) -> float:
        """When a block begins to be heard."""
        return self._origin + (position - self._base) * self._period

    def came_out(self, now: float, position: int) -> None:
        """The first block that took the usual way; all others are expected as soon after their beginning."""
        if self._playout is None:
            self._playout = now - (position - self._base) * self._period

    def late_at(self, position: int) -> float:
        """After this a block that is not out is late."""
        if self._playout is None:
            return math.inf
        return self._playout + (position - self._base) * self._period + self._cushion
