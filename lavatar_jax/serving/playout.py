"""One clock for everybody who watches a session: a moment goes out every 40 ms, picture and sound together.

When nothing is ready, silence goes out and the picture is held; what comes later waits its turn. So sound
and picture cannot drift apart, whatever the model, the encoder or the machine does.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Protocol

from lavatar_jax.serving.encoder import Moment

WATCHED = 125  # moments: after so many (5 s) with too much in store, some of it is given up
SPARE = 4  # moments that may be in store all the time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """A moment with its place on the clock. Without a moment: nothing was ready, or only its sound is left
    out (`sound`)."""

    time: float  # seconds; video and sound share it
    moment: Moment | None
    sound: bool = True


class Viewer(Protocol):
    def show(self, sent: Sent) -> None:
        """Takes what is sent now. Must not wait."""
        ...


class Playout:
    """Sends moments to viewers. Lives in the event loop's thread.

    `delay`: seconds by which the first moment waits, so that the next ones may be late by that much.
    """

    def __init__(
        self,
        fps: int,
        delay: float,
        *,
        on_underrun: Callable[[], None] = lambda: None,
        on_sent: Callable[[Sent], None] = lambda sent: None,
    ) -> None:
        self.viewers: list[Viewer] = []
        self.ticks = self.underruns = 0
        self._period, self._delay = 1.0 / fps, delay
        self._on_underrun, self._on_sent = on_underrun, on_sent
        self._store: deque[Moment] = deque()
        self._arrived = asyncio.Event()
        self._lowest: deque[int] = deque(maxlen=WATCHED)

    @property
    def stored(self) -> float:
        """Seconds that wait to be sent."""
        return len(self._store) * self._period

    def add(self, moments: list[Moment]) -> None:
        self._store.extend(moments)
        self._arrived.set()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        await self._arrived.wait()
        origin = loop.time() + self._delay
        while True:
            now = loop.time() - origin
            if self.ticks * self._period > now:
                await asyncio.sleep(self.ticks * self._period - now)
            elif now > (self.ticks + 50) * self._period:  # the machine slept: nobody wants 2 s at once
                origin += now - self.ticks * self._period
            self.tick()

    def tick(self) -> None:
        """Sends what is due."""
        time = self.ticks * self._period
        self.ticks += 1
        self._lowest.append(len(self._store))
        if not self._store:
            self.underruns += 1
            self._on_underrun()
            return self._send(Sent(time=time, moment=None))
        moment = self._store.popleft()
        if self._too_far_behind() and not moment.loud:
            # The decoder needs every picture, but of a pause nobody misses 40 ms of sound.
            self._send(Sent(time=time, moment=moment, sound=False))
            time, moment = time + self._period / 2, self._store.popleft()
            self._lowest.clear()
        self._send(Sent(time=time, moment=moment))

    def _too_far_behind(self) -> bool:
        """An underrun made everything later, and for seconds none of that was needed."""
        return len(self._lowest) == WATCHED and min(self._lowest) > self._usual() + SPARE

    def _usual(self) -> int:
        return round(self._delay / self._period)

    def _send(self, sent: Sent) -> None:
        for viewer in list(self.viewers):
            viewer.show(sent)
        self._on_sent(sent)
