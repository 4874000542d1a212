"""Texts and files for an avatar to say, for every way in which they can come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from lavatar_jax.models.speech_level import normalise_level
from lavatar_jax.serving.config import Limits
from lavatar_jax.serving.errors import ApiError, check_text
from lavatar_jax.serving.room import Room
from lavatar_jax.serving.tts import TextToSpeech
from lavatar_jax.serving.uploads import decode_sound

Samples = Float[np.ndarray, " n"]
WAITING = 16  # texts and files of one session
AT_ONCE = 2  # programs that speak, and as many files that are decoded


class Speech:
    """`level`: bring recordings to the loudness that the model knows.

    Work is done in threads of its own, so that who talks much keeps nobody from opening a session. A thread
    is busy until its program has ended, also when nobody waits for it any more.
    """

    def __init__(self, tts: TextToSpeech | None, limits: Limits, *, level: bool) -> None:
        self.tts, self.limits, self._level = tts, limits, level
        self._programs = ThreadPoolExecutor(AT_ONCE, "text to speech")
        self._decoders = ThreadPoolExecutor(AT_ONCE, "decoding")

    def about(self) -> dict[str, object]:
        """As clients see it."""
        if self.tts is None:
            return {"available": False, "engine": None, "voices": [], "default_voice": None}
        voices = list(self.tts.voices)
        return {"available": True, "engine": self.tts.name, "voices": voices, "default_voice": voices[0]}

    def say(self, room: Room, text: object, voice: object = None) -> Coroutine[Any, Any, float]:
        """Says a text, after all that was asked for earlier. To be awaited: the seconds that it takes; 0:
        it was interrupted before it began. Raises ApiError, at once where the request is wrong."""
        if self.tts is None:
            raise ApiError(501, "not_available", "There is no text-to-speech on this server.")
        text = check_text("text", text, self.limits.text_chars)
        if voice is None:
            voice = room.identity.voice or self.tts.voices[0]
        make = partial(self.tts.speak, text, check_voice(self.tts, voice))
        return self._in_turn(room, room.voice.turn, self._programs, make)

    def play(self, room: Room, file: bytes) -> Coroutine[Any, Any, float]:
        """Says a recording, as `say` does a text."""
        return self._in_turn(room, room.voice.turn, self._decoders, partial(self.normalised, file))

    async def _in_turn(
        self, room: Room, turn: asyncio.Lock, threads: ThreadPoolExecutor, make: Callable[[], Samples]
    ) -> float:
        """`turn`: the room's when this was asked for; who waits for it gets it in that order."""
        voice = room.voice

        def made() -> Samples | None:
            return make() if voice.turn is turn else None  # it may have waited for a thread until too late

        if voice.making >= WAITING:
            raise ApiError(429, "rate_limited", "Too much waits to be said; try again later.", retry_after=5)
        voice.making += 1
        try:
            async with turn:
                if voice.turn is not turn:
                    return 0.0
                samples = await asyncio.get_running_loop().run_in_executor(threads, made)
                room.check_open()
                return 0.0 if samples is None or voice.turn is not turn else voice.speak(samples)
        finally:
            voice.making -= 1

    def close(self) -> None:
        """Begins nothing more."""
        for threads in (self._programs, self._decoders):
            threads.shutdown(wait=False, cancel_futures=True)

    def normalised(self, data: bytes) -> Samples:
        """A recording as it is pushed; blocks. Raises ApiError."""
        samples = decode_sound(data, self.limits.sound_seconds)
        return normalise_level(samples) if self._level else samples


def check_voice(tts: TextToSpeech | None, voice: object) -> str:
    """Raises ApiError for a voice that there is not: names go into command lines."""
    if tts is None or not isinstance(voice, str) or voice not in tts.voices:
        known = ", ".join(tts.voices) if tts else "none"
        raise ApiError(422, "invalid", f"voice: one of {known}")
    return voice
