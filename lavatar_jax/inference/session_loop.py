"""The loop that several sessions share: who feeds in which tick, and what happens when one of them fails."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lavatar_jax.errors import UserError
from lavatar_jax.inference.conditions import to_uint8
from lavatar_jax.inference.fair_lock import FairLock
from lavatar_jax.inference.hush import Hush
from lavatar_jax.inference.pipeline import Feed, Pipeline
from lavatar_jax.inference.session import AvatarSession
from lavatar_jax.inference.session_core import Passenger

log = logging.getLogger(__name__)


class SessionLoop:
    """Steps a pipeline for the sessions in its `places` (slot -> session; None: reserved).

    `lock` guards the pipeline and the places; methods other than `step` are called with it held.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        clock: Callable[[], float],
        silence: Float[np.ndarray, "L A T"],
        parts: int,
    ) -> None:
        self._parts = parts
        self.pipeline, self._clock = pipeline, clock
        self.places: dict[int, AvatarSession | None] = {}
        self._hush = Hush(pipeline, silence)
        self.lock = FairLock()
        self._decoding: list[tuple[AvatarSession, Passenger, Array]] = []

    def open_sessions(self) -> list[AvatarSession]:
        return [s for s in self.places.values() if s is not None and s.reason is None]

    def step(self) -> float:
        """Does what is to be done now: at most one tick. Returns in how many seconds something will be due;
        infinity: not before something is pushed or read."""
        with self.lock:
            self.reap()
            feeds = self.feeds()
            if feeds or self.pipeline.busy:
                self.tick(feeds)
            else:
                self.deliver()
            wait = self._wait()
            if self._decoding and wait > 0:  # no other work to hide the decoder behind
                self.deliver()
                wait = self._wait()
            return wait

    def _wait(self) -> float:
        if self.pipeline.busy:
            return 0.0
        times = [time for s in self.open_sessions() for time in (s.due(), s.late_at())]
        if any(s.finished for s in self.open_sessions()):
            return 0.0
        return max(0.0, min(times, default=math.inf) - self._clock())

    def feeds(self) -> dict[int, Feed]:
        feeds = {}
        for session in self.open_sessions():
            with self._guard(session):
                session.hold_if_late(self._clock())
                if session.interrupted:
                    session.interrupted = False
                    self._hush(session.slot)
                self.set_text(session)
                feed = session.next_feed(self._clock())
                if feed is not None:
                    feeds[session.slot] = feed
                    if feed.index == session.adapt_at and session.adapted is not None:
                        self.pipeline.set_sink(session.slot, session.adapted, session.motion)
        return feeds

    def set_text(self, session: AvatarSession) -> None:
        """Hands a new prompt of the session over to the pipeline, once it has been read."""
        text = session.new_text()
        if text is not None:
            self.pipeline.set_text(session.slot, text)

    def tick(self, feeds: dict[int, Feed]) -> None:
        """One tick; frames of the tick before are handed out while the devices are at it."""
        finished = self.pipeline.tick(feeds)
        now = self._clock()
        sessions = {session.slot: session for session in self.open_sessions()}
        for slot in feeds:
            if slot in sessions:
                sessions[slot].entered(now)
        before, self._decoding = self._decoding, []
        for block in finished:
            session = sessions.get(block.slot)
            if session is None:
                continue
            with self._guard(session):
                passenger = session.came_out(block)
                if passenger is not None:
                    for latent in jnp.split(block.latent, self._parts, axis=1):
                        frames = to_uint8(self.pipeline.decode(dataclasses.replace(block, latent=latent)))
                        self._decoding.append((session, passenger, frames))
        before, self._decoding = self._decoding, before
        self.deliver()
        self._decoding = before
        if any(session.options.live for session in sessions.values()):
            # Ticks given out ahead would make a block that becomes due wait for all of them.
            jax.block_until_ready(self.pipeline.rings[0].k)
        now = self._clock()
        for session in sessions.values():
            session.passed_stage(now)
        for _, passenger, _ in self._decoding:
            passenger.shown = True

    def deliver(self) -> None:
        ready, self._decoding = self._decoding, []
        for session, passenger, frames in ready:
            if session.reason is None:
                with self._guard(session):
                    on_host = np.asarray(frames)[0]
                    session.deliver(passenger, on_host, self._clock())

    @contextlib.contextmanager
    def _guard(self, session: AvatarSession) -> Iterator[None]:
        """What goes wrong in one session closes that session."""
        try:
            yield
        except UserError as error:
            session.close(str(error))
        except Exception as error:
            log.exception("session in slot %d failed", session.slot)
            session.close(f"failed: {type(error).__name__}")

    def reap(self) -> None:
        for slot, session in list(self.places.items()):
            if session is None:
                continue
            if session.reason is None and session.finished:
                session.close("finished")
            if session.reason is not None:
                self.pipeline.close(slot)
                del self.places[slot]
