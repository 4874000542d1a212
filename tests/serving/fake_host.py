"""A session host without a model: grey pictures in real time, and the sound that was pushed."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lavatar_jax.errors import UserError
from lavatar_jax.inference.audio_queue import clean
from lavatar_jax.inference.latency import BlockLatency, SessionStats
from lavatar_jax.inference.session_host import Busy
from lavatar_jax.inference.spoken import Outbox, SpokenBlock

PART, FPS, PARTS = 4, 25, 3
SAMPLES = PART * 640


class FakeSession:
    """What the server uses of an AvatarSession. A part of a block is ready every 160 ms."""

    def __init__(self, host: FakeHost, prompt: str) -> None:
        self.host, self.prompts = host, [prompt]
        self.reason: str | None = None
        self.outbox = Outbox(24)
        self.stats = SessionStats(opened=time.monotonic())
        self.interrupts = 0
        self.sound = np.zeros(0, np.float32)
        self._lock = threading.Lock()
        self._parts = self.fed = 0
        self._arrived, self._silent = 0.0, True
        self._start = time.monotonic()

    @property
    def queued_seconds(self) -> float:
        return len(self.sound) / 16_000

    def push_audio(self, samples: np.ndarray) -> int:
        samples = clean(samples)
        with self._lock:
            if self.reason is not None:
                raise UserError("the session is closed")
            self._arrived = time.monotonic()
            self.sound = np.concatenate([self.sound, samples])
        return len(samples)

    def end_of_speech(self) -> None: ...

    def interrupt(self) -> None:
        with self._lock:
            self.sound, self.interrupts = self.sound[:0], self.interrupts + 1

    def set_prompt(self, prompt: str) -> None:
        self.prompts.append(prompt)

    def read(self, timeout: float | None = 0.0) -> SpokenBlock | None:
        due = self._start + self._parts * PART / FPS
        wait = max(0.0, due - time.monotonic())
        time.sleep(min(wait, 0.02 if timeout is None else min(timeout, 0.02)))
        if self.reason is not None or time.monotonic() < due:
            return None
        with self._lock:
            sound, self.sound = np.split(self.sound, [SAMPLES])
            sound = np.pad(sound, (0, SAMPLES - len(sound)))
            loud = np.flatnonzero(sound)
            speech = (int(loud[0]) // 640, self._arrived) if len(loud) and self._silent else None
            self._silent = not len(loud)
        index, part = divmod(self._parts, PARTS)
        self._parts += 1
        now = time.monotonic()
        self.stats.first_out = self.stats.first_out or now
        self.stats.blocks = index
        frames = np.full((PART, 16, 16, 3), 40 * (index % 5), np.uint8)
        latency = BlockLatency(
            taken=now - 0.05, fed=now - 0.04, stages=[now - 0.02], decoded=now, complete=now
        )
        return SpokenBlock(
            index=index, part=part, time=(index * PARTS + part) * PART / FPS, frames=frames, sound=sound,
            latency=latency, speech=speech,
        )  # fmt: skip

    def close(self, reason: str = "closed") -> None:
        if self.reason is None:
            self.reason = reason
            self.host.sessions.remove(self)
            self.outbox.close()


class FakeHost:
    def __init__(self, slots: int = 2) -> None:
        config = SimpleNamespace(
            name="fake", fps=FPS, speech=None, image_size=16,
            dit=SimpleNamespace(block_frames=3), vae=SimpleNamespace(temporal_factor=4),
        )  # fmt: skip
        self.avatar = SimpleNamespace(config=config)
        self.slots, self.size, self.parts = slots, (16, 16), PARTS
        self.sessions: list[FakeSession] = []
        self.opened: list[FakeSession] = []
        self.closed = False
        self.running = True
        self._lock = threading.Lock()

    def start(self) -> None: ...

    def open(self, image: np.ndarray, *, prompt: str = "", seed: int = 0, **options: object) -> FakeSession:
        assert image.dtype == np.uint8
        assert image.ndim == 3
        with self._lock:
            if len(self.sessions) >= self.slots:
                raise Busy("full")
            session = FakeSession(self, prompt)
            self.sessions.append(session)
            self.opened.append(session)
            return session

    def save(self, session: FakeSession, path: Path) -> None:
        path.write_text(session.prompts[-1])

    def restore(self, path: Path) -> FakeSession:
        return self.open(np.full((*self.size, 3), 128, np.uint8), prompt=path.read_text())

    def close(self, reason: str = "stops") -> None:
        self.closed = True
        for session in list(self.sessions):
            session.close(reason)
