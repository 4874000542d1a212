"""What the avatar is to say: a microphone, or speech that was sent, one at a time.

Speech that was sent (a text, a file, pieces of sound) has the floor until it is said; the microphone is not
heard meanwhile, or its silence would be put between the words.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from lavatar_jax.errors import UserError
from lavatar_jax.inference.session import AvatarSession
from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.level import RunningLevel

Samples = Float[np.ndarray, " n"]
AHEAD = 30.0  # seconds of sent speech that the session itself holds; it has room for twice as much
LATE = 0.25  # seconds of microphone that may wait; beyond it, its silence is left out
FASTER, BURST = 2.0, 5.0  # than it is spoken, a microphone may come; and seconds of it at once
SHORTEST = 0.001  # seconds that a piece counts for at least: each is work, however short
PIECES_STOP = 2.0  # without a new piece for so long, pieced speech has ended


class Voice:
    """Feeds a session. For the event loop's thread.

    `level`: bring sound to the loudness that the model knows. `on_done`: all that was sent has been handed
    on. `on_dropped`: so many seconds of a microphone came too fast. `turn`: held while speech is being made,
    which takes time, so that what was asked for first is said first; an interruption puts a new one in its
    place, by which its holder knows that nobody waits any more.
    """

    def __init__(
        self,
        session: AvatarSession,
        *,
        level: bool,
        longest: float,
        on_done: Callable[[], None] = lambda: None,
        on_dropped: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.muted = False
        self.echo = True
        self.active = time.monotonic()  # when something was last said or asked
        self.turn = asyncio.Lock()
        self.making = 0  # texts and files that have or want a turn
        self.microphone_level = RunningLevel()
        self._session, self._level, self._longest, self._on_done = session, level, longest, on_done
        self._on_dropped = on_dropped
        self._allowed, self._allowed_at = BURST, time.monotonic()  # seconds of a microphone, and since when
        self._pieces_level = RunningLevel()
        self._waiting: deque[Samples] = deque()
        self._samples = 0  # in them
        self._open_until = 0.0  # more pieces are announced
        self._sending: asyncio.Task[None] | None = None
        self._listening = False

    @property
    def queued(self) -> float:
        """Seconds that wait to be said."""
        return self._samples / SAMPLE_RATE + self._session.queued_seconds

    def admits(self, seconds: float) -> bool:
        """Whether a piece of a microphone may be worked on: all sessions share one thread for that, so what
        comes faster than anybody speaks, also over several connections, is dropped before."""
        now = time.monotonic()
        self._allowed = min(BURST, self._allowed + FASTER * (now - self._allowed_at))
        self._allowed_at = now
        if max(seconds, SHORTEST) > self._allowed:
            self._on_dropped(seconds)
            return False
        self._allowed -= max(seconds, SHORTEST)
        return True

    def microphone(self, samples: Samples) -> None:
        """Mono, 16 kHz, as it is spoken."""
        if not self.echo or self.muted or self._sending is not None:
            return
        samples = np.clip(np.nan_to_num(samples, posinf=0.0, neginf=0.0), -1.0, 1.0)
        levelled = self.microphone_level(samples)  # it also knows who is silent
        if self._level:
            samples = levelled
        if self.microphone_level.open:
            self.active = time.monotonic()
        elif self._session.queued_seconds > LATE:
            return
        self._push(samples)
        self._listening = True

    def microphone_stopped(self) -> None:
        if self._listening and self._sending is None:
            self._session.end_of_speech()
        self._listening = False

    def speak(self, samples: Samples, *, more: bool = False) -> float:
        """Says a whole utterance, or a piece of one (`more` follow, at any loudness). Returns its seconds.

        Nothing is said of an empty one. Raises ApiError when too much waits already.
        """
        if not len(samples):
            return 0.0
        self.active = time.monotonic()
        if self.queued + len(samples) / SAMPLE_RATE > self._longest:
            raise ApiError(413, "too_large", f"More than {self._longest:.0f} s of speech would wait.")
        seconds = len(samples) / SAMPLE_RATE
        samples = np.nan_to_num(samples, posinf=0.0, neginf=0.0)
        if more and self._level:
            samples = self._pieces_level(samples)
        if len(samples):  # levelled, a short one may be empty: it comes with the next
            self._waiting.append(samples)
            self._samples += len(samples)
        self._open_until = time.monotonic() + PIECES_STOP if more else 0.0
        if self._sending is None:
            if self._listening:
                self._session.end_of_speech()
            self._sending = asyncio.get_running_loop().create_task(self._send())
        return seconds

    def speak_end(self) -> None:
        """No more pieces follow."""
        self._open_until = 0.0

    def interrupt(self) -> None:
        """Stops talking; what was sent and not said is dropped, also what is still being made."""
        self.active = time.monotonic()
        self.turn = asyncio.Lock()
        self._waiting.clear()
        self._samples = 0
        self._open_until = 0.0
        self._session.interrupt()

    async def _send(self) -> None:
        """Hands speech on as there is room for it, and waits until it has been heard."""
        told = True
        try:
            while True:
                while self._waiting and self._session.queued_seconds < AHEAD:
                    piece = self._waiting.popleft()
                    now, later = np.split(piece, [SAMPLE_RATE * 5])
                    if len(later):
                        self._waiting.appendleft(later)
                    self._samples -= len(now)
                    self._push(now)
                    told = False
                more = time.monotonic() < self._open_until
                if not self._waiting and not more:
                    if not told:
                        self._session.end_of_speech()
                        told = True
                    if self._session.queued_seconds == 0.0:
                        break
                if self._session.reason is not None:
                    break
                self.active = time.monotonic()
                await asyncio.sleep(0.02)
        finally:
            self._sending = None
        self._on_done()

    def _push(self, samples: Samples) -> None:
        with contextlib.suppress(UserError):  # closed: its owner is told in another way
            self._session.push_audio(samples)

    def stop(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
