"""One avatar's session as a server holds it: sound in as it arrives, frames with their sound out."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import wait
from typing import Self

import numpy as np
from jaxtyping import Array, Float

from lavatar_jax.errors import UserError
from lavatar_jax.inference.audio_queue import clean
from lavatar_jax.inference.hearing import fade_out
from lavatar_jax.inference.session_core import PAUSE, SessionCore
from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.inference.spoken import SpokenBlock


class AvatarSession(SessionCore):
    """Made by `SessionHost.open`; all methods here are thread-safe.

    Iterating yields `SpokenBlock`s until the session is closed. `stats` counts what happened, `reason` says
    why it was closed (None: it is open).
    """

    def push_audio(self, samples: Float[np.ndarray, " n"]) -> int:
        """Takes mono sound of 16 kHz, in any chunks; NaN and infinities are silence.

        Returns how many samples there was room for. Live, the rest is lost and counted; otherwise push it
        again when blocks have been read. Raises UserError when the session is closed.
        """
        samples = clean(samples)
        now = self._clock()
        with self._lock:
            self.check_open()
            self._ended = False
            if self.stats.first_audio is None and len(samples):
                self.stats.first_audio = now
            accepted = self._queue.push(samples, now)
            if self.options.live:
                self.stats.dropped_samples += len(samples) - accepted
        self._wake(None)
        return accepted

    def end_of_speech(self) -> None:
        """What was pushed is complete: its last block need not wait for more, silence follows."""
        with self._lock:
            self._ended = True
        self._wake(None)

    def finish(self) -> None:
        """End of speech, and the session closes when all of it has come out."""
        with self._lock:
            self._ended = self._finishing = True
        self._wake(None)

    def interrupt(self) -> None:
        """Stop talking: sound that waits is dropped, sound on its way out fades within 5 ms.

        Blocks already on their way finish without sound, their remaining steps hear silence, and so do all
        blocks after them.
        """
        with self._lock, self.outbox.changed:
            self._queue.clear()
            self._onsets.clear()
            self._ended, self._quiet, self.interrupted = True, PAUSE, True
            sounds = [block.sound for block in self.outbox.blocks]
            sounds += [passenger.unsent_sound(self._delivery.parts) for passenger in self._unsent]
            for position, sound in enumerate(sounds):
                fade_out(sound, begun=position > 0)
            self._hearing.fade_out(begun=bool(sounds))
        self._wake(None)

    def set_prompt(self, prompt: str | Array) -> None:
        """How the avatar behaves from the next block on: words, or the states of a model's text encoder.

        Words are read beside the blocks: live, those that are made meanwhile have the old prompt; otherwise
        this waits. Raises UserError when the session is closed, which words that cannot be read do.
        """
        with self._lock:
            self.check_open()
            before, self._text = self._text, self._read_prompt(prompt)
            text = self._text
        if before is not None:
            before.cancel()  # nobody will look at it
        if not self.options.live:
            wait([text])
        text.add_done_callback(lambda _: self._wake(None))

    def await_prompt(self) -> None:
        """Until the words that were given last have been read."""
        with self._lock:
            text = self._text
        if text is not None:
            wait([text])

    def read(self, timeout: float | None = 0.0) -> SpokenBlock | None:
        """The next block; None if there is none within `timeout` seconds (None: for ever), or ever again."""
        block = self.outbox.get(timeout)
        if block is not None and not self.options.live:
            self._wake(None)  # there is room again
        return block

    def __iter__(self) -> Iterator[SpokenBlock]:
        return self

    def __next__(self) -> SpokenBlock:
        while (block := self.read()) is None:
            if self.outbox.closed and not len(self.outbox):
                raise StopIteration
            self._wake(self)
        return block

    def close(self, reason: str = "closed") -> None:
        """Ends the session; blocks that are out can still be read. A second call changes nothing."""
        if self.reason is None:
            self.reason = reason
        self.outbox.close()
        self._wake(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def queued_seconds(self) -> float:
        """Sound that waits to be heard."""
        return len(self._queue) / SAMPLE_RATE

    def check_open(self) -> None:
        """Raises UserError when the session is closed."""
        if self.reason is not None:
            raise UserError(f"the session is closed: {self.reason}")
