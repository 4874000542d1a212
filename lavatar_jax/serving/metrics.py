"""What operators watch, as Prometheus reads it."""

from __future__ import annotations

import threading

import jax
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
disable_created_metrics()  # when each was created, as a second series: of no use here
COMPILED = "/jax/core/compile/backend_compile_duration"


class Metrics:
    """All measures of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, about: str) -> Histogram:
            return Histogram(f"lavatar_{name}_seconds", about, buckets=SECONDS, registry=registry)

        def counter(name: str, about: str) -> Counter:
            return Counter(f"lavatar_{name}", about, registry=registry)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"lavatar_{name}", about, registry=registry)

        self.block = histogram("block", "From taking a block's sound to its last frame")
        self.ttff = histogram("ttff", "First sound of a session (or opening) to first frame")
        self.first_frame = histogram("first_frame", "Opening of a session to first frame")
        self.silence_to_speech = histogram("silence_to_speech", "Speech arrives after a pause to frame out")
        self.encode = histogram("encode", "Marking and encoding a part of a block")
        self.real_time_factor = gauge("real_time_factor", "Seconds of work for a second of video, last block")
        self.queue_depth = gauge("queue_depth", "Creations that wait for a place")
        self.sessions = gauge("sessions", "Open sessions")
        self.places = gauge("places", "Sessions that fit")
        self.viewers = gauge("viewers", "Connections that receive media")
        self.underruns = counter(
            "underruns", "Times that the picture was held and silence inserted, by 40 ms"
        )
        self.held = counter("held_blocks", "Blocks that were late, and covered by the last frame")
        self.frames = counter("frames", "Frames played out")
        self.dropped_frames = counter("dropped_frames", "Frames that a slow client did not get")
        self.dropped_microphone = counter(
            "dropped_microphone_seconds", "Microphone that came faster than anybody speaks"
        )
        self.refused = Counter("lavatar_refused", "Creations that were refused", ["code"], registry=registry)
        self.closed = Counter("lavatar_closed_sessions", "Sessions that ended", ["code"], registry=registry)
        self.recompiles = counter("recompiles", "Programs compiled after the server was ready")
        self._counting = threading.Event()
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def count_recompiles(self) -> None:
        """From now on a compilation is one too many."""
        self._counting.set()

    def _compiled(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED and self._counting.is_set():
            self.recompiles.inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
