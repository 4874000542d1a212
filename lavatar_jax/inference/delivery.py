"""The way out of a session: decoded frames take their place in time, and late ones are covered for."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from lavatar_jax.inference.latency import BlockLatency, SessionStats
from lavatar_jax.inference.pace import Pace
from lavatar_jax.inference.spoken import Outbox, SpokenBlock

OnBlock = Callable[[SpokenBlock], None]
Frames = UInt8[np.ndarray, "T H W 3"]


@dataclasses.dataclass(kw_only=True)
class Passenger:
    """A block from its feed until its frames are handed out."""

    index: int
    sound: Float[np.ndarray, " n"]
    latency: BlockLatency
    speech_at: int | None = None  # the sample at which speech begins after a pause
    shown: bool = False  # its frames are being decoded, or out
    early: bool = False
    sent: int = 0  # parts

    def unsent_sound(self, parts: int) -> Float[np.ndarray, " n"]:
        return self.sound[self.sent * len(self.sound) // parts :]


class Delivery:
    """Hands out blocks in order, each in `parts`: to a callback, or to an outbox of bounded size."""

    def __init__(
        self,
        *,
        frames: int,
        samples: int,
        fps: int,
        parts: int,
        pace: Pace | None,
        outbox: Outbox,
        stats: SessionStats,
        clock: Callable[[], float],
        lock: threading.RLock,
        on_block: OnBlock | None,
    ) -> None:
        self.parts, self._frames, self._samples, self._fps = parts, frames, samples, fps
        self._pace, self._outbox, self._stats, self._clock = pace, outbox, stats, clock
        self._lock, self._on_block = lock, on_block
        self.out = self.held = 0  # blocks; out counts the held ones too
        self.last_frame: UInt8[np.ndarray, "1 H W 3"] | None = None
        self._inside = False  # some parts of a block are out

    def send(self, passenger: Passenger, frames: Frames, decoded: float) -> bool:
        """Hand out the next part of a block; returns whether that was the last. Raises what a callback
        does."""
        missing = self._frames // self.parts - len(frames)
        if missing:  # the first block, where decoding drops some: its sound has them, as silence
            frames = np.concatenate([frames[:1].repeat(missing, axis=0), frames])
        self.last_frame = frames[-1:]
        now = self._clock()
        if passenger.sent == 0:
            self._first_part(passenger, decoded, now)
        passenger.latency.complete = now
        size, part = len(passenger.sound) // self.parts, passenger.sent
        speech = None
        if passenger.speech_at is not None and passenger.speech_at // size == part:
            assert passenger.latency.first_speech is not None
            self._stats.silence_to_speech.append(now - passenger.latency.first_speech)
            speech = passenger.speech_at % size * len(frames) // size, passenger.latency.first_speech
        with self._lock:  # an interrupt finds the sound either here or there
            sound = passenger.sound[part * size : (part + 1) * size]
            passenger.sent += 1
            block = self._block(
                part, frames, sound, early=passenger.early, latency=passenger.latency, speech=speech
            )
            self._inside = passenger.sent < self.parts
            if self._on_block is None:
                self._put(block)
        if self._on_block is not None:
            self._on_block(block)
        if not self._inside:
            self._done()
        return not self._inside

    def _first_part(self, passenger: Passenger, decoded: float, now: float) -> None:
        passenger.latency.decoded, passenger.latency.out = decoded, now
        self._stats.early += passenger.early
        if self._stats.first_out is None:
            self._stats.first_out = now
        if self._pace is not None and not passenger.early:
            self._pace.came_out(now, self.out)

    def hold_if_late(self, now: float) -> None:
        """Show the last frame for the time of a block that is not there. What follows moves on by a block."""
        while now > self.late_at():
            assert self.last_frame is not None
            count, size = self._frames // self.parts, self._samples // self.parts
            for part in range(self.parts):
                frames = np.broadcast_to(self.last_frame, (count, *self.last_frame.shape[1:]))
                block = self._block(part, frames, np.zeros(size, np.float32), held=True)
                if self._on_block is None:
                    self._put(block)
                else:
                    self._on_block(block)
            self.held += 1
            self._stats.held += 1
            self._done()

    def late_at(self) -> float:
        """When the next block is late, in the clock's time."""
        return math.inf if self._pace is None or self._inside else self._pace.late_at(self.out)

    def _block(self, part: int, frames: Frames, sound: np.ndarray, **about) -> SpokenBlock:
        frame = self.out * self._frames + part * (self._frames // self.parts)
        time = frame / self._fps
        return SpokenBlock(index=self.out, part=part, time=time, frames=frames, sound=sound, **about)

    def _put(self, block: SpokenBlock) -> None:
        self._stats.dropped_frames += self._outbox.put(block)

    def _done(self) -> None:
        self.out += 1
        self._stats.blocks += 1
