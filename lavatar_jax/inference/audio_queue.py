"""Sound that arrived and has not been heard yet: bounded, in any chunking, with the time of its arrival."""

from __future__ import annotations

from collections import deque

import numpy as np
from jaxtyping import Float

from lavatar_jax.inference.sound import SAMPLE_RATE

Samples = Float[np.ndarray, " n"]
MARK = SAMPLE_RATE // 100  # arrival times are kept for pieces of about 10 ms, however small the pushes
PIECE = SAMPLE_RATE // 50  # loudness is judged over 20 ms
QUIET_DB = -45.0  # of full scale: softer counts as a pause


def clean(samples: Samples) -> Samples:
    """A float32 copy in which NaN and infinities are silence. Raises ValueError unless there is one axis."""
    samples = np.array(samples, np.float32)
    if samples.ndim != 1:
        raise ValueError(f"sound is one row of mono samples [n], not {list(samples.shape)}")
    return np.nan_to_num(samples, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def loud_pieces(samples: Samples) -> np.ndarray:
    """Which pieces of 20 ms are louder than a pause: bool [ceil(n / 320)]."""
    padded = np.pad(samples, (0, -len(samples) % PIECE)).reshape(-1, PIECE)
    return np.square(padded).mean(axis=1) > 10.0 ** (QUIET_DB / 10.0)


class Heard:
    """Samples taken from a queue, and when each of them had arrived."""

    def __init__(self, samples: Samples, marks: list[tuple[int, float]]) -> None:
        self.samples, self._marks = samples, marks  # (end of a piece, its arrival)

    def arrival(self, sample: int = -1) -> float | None:
        """When a sample arrived; None if there is none."""
        sample = sample % max(1, len(self.samples))
        return next((time for end, time in self._marks if end > sample), None)


class AudioQueue:
    """First in, first out, in a buffer of fixed size. What does not fit is not taken."""

    def __init__(self, capacity: int) -> None:
        self._buffer = np.zeros(capacity, np.float32)
        self._start = self._end = 0  # absolute positions; they wrap in the buffer
        self._marks: deque[tuple[int, float]] = deque()

    def __len__(self) -> int:
        return self._end - self._start

    def push(self, samples: Samples, now: float) -> int:
        """Returns how many of the samples there was room for: the first ones."""
        samples = samples[: len(self._buffer) - len(self)]
        if not len(samples):
            return 0
        self._buffer[self._places(self._end, len(samples))] = samples
        self._end += len(samples)
        if self._marks and self._end - self._mark_start() <= MARK:
            self._marks.pop()
        self._marks.append((self._end, now))
        return len(samples)

    def _mark_start(self) -> int:
        return self._marks[-2][0] if len(self._marks) > 1 else self._start

    def _places(self, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count) % len(self._buffer)

    def take(self, count: int) -> Heard:
        """The oldest samples, at most `count`."""
        start, self._start = self._start, min(self._start + count, self._end)
        marks = [(end - start, time) for end, time in self._marks if end > start]
        while self._marks and self._marks[0][0] <= self._start:
            self._marks.popleft()
        return Heard(self._buffer[self._places(start, self._start - start)], marks)

    def peek(self) -> Samples:
        """A copy of all that waits."""
        return self._buffer[self._places(self._start, len(self))]

    def skip_silence(self, longest: int) -> int:
        """Drops pauses from the front while more than `longest` samples wait; returns how many it dropped."""
        before = len(self)
        while len(self) >= longest + PIECE:
            if loud_pieces(self._buffer[self._places(self._start, PIECE)])[0]:
                break
            self.take(PIECE)
        return before - len(self)

    def clear(self) -> int:
        """Returns how many samples were dropped."""
        dropped, self._start = len(self), self._end
        self._marks.clear()
        return dropped
