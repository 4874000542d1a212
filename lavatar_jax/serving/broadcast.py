"""From a session's blocks to moments on their way: a thread of its own reads, marks, encodes and records."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable

from lavatar_jax.errors import UserError
from lavatar_jax.inference.session import AvatarSession
from lavatar_jax.inference.spoken import SpokenBlock
from lavatar_jax.serving.encoder import Encoder, Moment
from lavatar_jax.serving.metrics import Metrics
from lavatar_jax.serving.playout import Playout
from lavatar_jax.serving.recording import Recording

log = logging.getLogger(__name__)


class Broadcast:
    """Reads a session to its end. `on_end` and `on_recording_failed` are called in the event loop."""

    def __init__(
        self,
        session: AvatarSession,
        encoder: Encoder,
        playout: Playout,
        metrics: Metrics,
        *,
        name: str,
        block_seconds: float,
        on_end: Callable[[], None],
        on_recording_failed: Callable[[Recording, str], None],
    ) -> None:
        self.recording: Recording | None = None
        self.parts_ms: dict[str, float] = {}  # where the time of the last block went
        self.block_ms: float | None = None
        self.bytes = 0
        self._session, self._encoder, self._playout, self._metrics = session, encoder, playout, metrics
        self._block_seconds = block_seconds
        self._on_end, self._on_recording_failed = on_end, on_recording_failed
        self._loop = asyncio.get_running_loop()
        self._held = 0
        self._first = True
        self._thread = threading.Thread(target=self._run, name=f"broadcast {name}", daemon=True)
        self._thread.start()

    @property
    def real_time_factor(self) -> float | None:
        return None if self.block_ms is None else self.block_ms / 1e3 / self._block_seconds

    def join(self) -> None:
        """Waits until a closed session has been read to its end."""
        self._thread.join(timeout=5.0)

    def force_keyframe(self) -> None:
        self._encoder.video.force_keyframe()

    def _run(self) -> None:
        try:
            while not (self._session.outbox.closed and not len(self._session.outbox)):
                block = self._session.read(timeout=0.5)
                if block is not None:
                    self._take(block)
        except Exception:
            log.exception("broadcasting failed")
            self._session.close("failed: broadcast")
        finally:
            if self.recording is not None:
                self.recording.close()
            self._call(self._on_end)

    def _take(self, block: SpokenBlock) -> None:
        start = time.monotonic()
        moments = self._encoder.encode(block.time, block.frames, block.sound)
        if block.speech is not None:
            frame, arrived = block.speech
            moments[frame] = dataclasses.replace(moments[frame], speech=arrived)
        self.bytes += sum(len(moment.video) for moment in moments)
        encoded, waits = time.monotonic() - start, self._playout.stored
        self._call(self._playout.add, moments)
        self._record(moments)
        self._measure(block, encoded, waits)

    def _record(self, moments: list[Moment]) -> None:
        recording = self.recording
        if recording is not None and recording.state == "on":
            try:
                recording.write(moments)
            except UserError as error:
                self._call(self._on_recording_failed, recording, str(error))

    def _measure(self, block: SpokenBlock, encoded: float, waits: float) -> None:
        """`encoded`: seconds that it took. `waits`: seconds until its first frame is sent."""
        metrics, stats = self._metrics, self._session.stats
        metrics.encode.observe(encoded)
        metrics.held.inc(max(0, stats.held - self._held))
        self._held = max(self._held, stats.held)
        if self._first and stats.first_frame is not None and stats.ttff is not None:
            self._first = False
            metrics.first_frame.observe(stats.first_frame)
            metrics.ttff.observe(stats.ttff)
        latency = block.latency
        if latency is None:
            return
        if block.part == 0:
            parts = latency.parts()
            stages = sum(value for name, value in parts.items() if name.startswith("stage"))
            merged = {name: value for name, value in parts.items() if not name.startswith("stage")}
            merged |= {"stages": stages, "encode": encoded, "send": waits}
            self.parts_ms = {name: round(1e3 * value, 1) for name, value in merged.items()}
        else:
            work = latency.complete - latency.taken
            self.block_ms = round(1e3 * work, 1)
            metrics.block.observe(work)
            metrics.real_time_factor.set(work / self._block_seconds)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)
