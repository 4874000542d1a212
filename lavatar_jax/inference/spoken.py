"""What a session gives out: frames with the sound that belongs to them, in a bounded queue for its reader."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque

import numpy as np
from jaxtyping import Float, UInt8

from lavatar_jax.inference.latency import BlockLatency


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpokenBlock:
    """The frames of a block, or of a part of it, and the sound that belongs to them.

    A block is 12 frames, 480 ms. It comes in as many parts as the host was told, usually one for each latent
    frame: 4 frames, 160 ms. Indices count 0, 1, 2, ... without a gap, so that `time` is exact for ever. A
    `held` block stands in for a late one: copies of the last frame, no sound.
    """

    index: int
    part: int = 0
    time: float  # seconds from the session's start at which the first frame is shown: 0.48 * index + ...
    frames: UInt8[np.ndarray, "T H W 3"]
    sound: Float[np.ndarray, " n"]  # 16 kHz
    held: bool = False
    early: bool = False  # shown before its last denoising steps
    latency: BlockLatency | None = None
    speech: tuple[int, float] | None = None  # begins after a pause: in which frame, and when it had arrived


class Outbox:
    """Finished blocks that wait for the reader. One thread fills it, any thread reads."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: deque[SpokenBlock] = deque()
        self.closed = False
        self.changed = threading.Condition()

    def __len__(self) -> int:
        return len(self.blocks)

    def put(self, block: SpokenBlock) -> int:
        """Appends a block; returns how many of the oldest frames were dropped for it."""
        dropped = 0
        with self.changed:
            while len(self.blocks) >= self.capacity:
                dropped += len(self.blocks.popleft().frames)
            self.blocks.append(block)
            self.changed.notify_all()
        return dropped

    def get(self, timeout: float | None = 0.0) -> SpokenBlock | None:
        """The oldest block; None if there is none within `timeout` (None: for ever) or ever again."""
        with self.changed:
            self.changed.wait_for(lambda: self.blocks or self.closed, timeout)
            return self.blocks.popleft() if self.blocks else None

    def close(self) -> None:
        """Nothing follows; what is there can still be read."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
